"""Images that a filter answers to most, made by gradient ascent.

Caron et al. 2018, section 4.1 and figure 4, with the published objective, decay, blur and step.

Legend of suffixes: B images (one for each filter), C channels, H W image height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from clusterssl.config import require_numbers
from clusterssl.insight.maps import watched
from clusterssl.rng import Stream, uniform


@dataclass(frozen=True)
class AscentOptions:
    """Gradient ascent."""

    niter: int = 1000
    """steps"""
    lr: float = 3.0
    """length of a step, in grey levels (0 to 255) over the whole image"""
    ascent_wd: float = 1e-5
    """weight of the squared length of the normalised image in the objective"""
    sig: float = 0.3
    """radius of the Gaussian blur in pixels; 0: none"""
    step: int = 5
    """steps between two blurs"""

    def __post_init__(self) -> None:
        require_numbers(self, "niter", "lr", "step", above=0)
        require_numbers(self, "ascent_wd", "sig", least=0)


def ascend(
    backbone: nn.Module, layer: str, filters: Sequence[int], image_size: tuple[int, int], options: AscentOptions, *,
    normalize: Callable[[Tensor], Tensor], seed: int, device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Climb from noise, 128 + 20 n with n normal, towards log softmax(y)_f - wd |z|^2; y is the layer's spatial mean.

    Images are grey levels from 0 to 255 and beyond; the network sees z, scaled to 0..1 and normalised as it was
    trained, where the published code feeds grey levels; so gradient and decay are those of z. A filter that is silent
    is led by what it says before the ReLU.

    Args:
        backbone: frozen, in evaluation mode.
        layer: see `maps.watched`.
        filters: channels f of the layer, one image for each.
        image_size: height and width.
        options: steps, decay, blur.
        normalize: from images in 0..1 to what the network sees.
        seed: of the noise.
        device: where to compute.

    Returns:
        Images float32 [B, 3, H, W] in grey levels, and the mean answers float32 [2, B] at the start and at the end.
    """
    x_B3HW = _noise(seed, filters, image_size).to(device)
    wanted_B = torch.tensor(list(filters), device=device)
    blur = _blur(options.sig, device)
    answers: list[Tensor] = []
    with watched(backbone, layer) as seen:
        for iteration in range(options.niter):
            seen_B3HW = normalize(x_B3HW / 255).requires_grad_(True)
            backbone(seen_B3HW)
            y_BC = seen.cut().mean((2, 3))
            answer_B = y_BC.gather(1, wanted_B[:, None])[:, 0]
            answers = [*answers[:1], answer_B.detach()]
            silent_B = answer_B == 0
            raw_BC = seen.raw_BChw.mean((2, 3))
            y_BC = torch.where(silent_B[:, None], raw_BC, y_BC)
            gain = -F.cross_entropy(y_BC, wanted_B, reduction="sum") - options.ascent_wd * seen_B3HW.square().sum()
            (grad_B3HW,) = torch.autograd.grad(gain, seen_B3HW)
            length_B = grad_B3HW.flatten(1).norm(dim=1) + 1e-8
            x_B3HW = x_B3HW + options.lr * grad_B3HW / length_B[:, None, None, None]
            if iteration % options.step == 0:
                x_B3HW = blur(x_B3HW)
        with torch.no_grad():
            backbone(normalize(x_B3HW / 255))
            last_B = seen.cut().mean((2, 3)).gather(1, wanted_B[:, None])[:, 0]
    return x_B3HW.cpu(), torch.stack([answers[0], last_B]).cpu()


def _noise(seed: int, filters: Sequence[int], image_size: tuple[int, int]) -> Tensor:
    """Normal noise around middle grey, by Box and Muller from counter-based draws."""
    numbers = 3 * image_size[0] * image_size[1]
    u_B2 = uniform(seed, Stream.PIXELS, 7, np.asarray(filters), 2 * numbers)
    normal = np.sqrt(-2 * np.log1p(-u_B2[:, :numbers])) * np.cos(2 * np.pi * u_B2[:, numbers:])
    return torch.from_numpy((128 + 20 * normal).astype(np.float32)).reshape(len(filters), 3, *image_size)


def _blur(sigma: float, device: torch.device | str) -> Callable[[Tensor], Tensor]:
    """Gaussian blur of both image axes, borders reflected, cut at four sigmas as scipy does."""
    reach = int(4 * sigma + 0.5)
    if reach == 0:
        return lambda x: x
    distance = torch.arange(-reach, reach + 1, device=device, dtype=torch.float32)
    taps = (-0.5 * (distance / sigma) ** 2).exp()
    taps = (taps / taps.sum()).repeat(3, 1)

    def blur(x_B3HW: Tensor) -> Tensor:
        for axis in (2, 3):
            kernel = taps[:, None, :, None] if axis == 2 else taps[:, None, None, :]
            pad = (0, 0, reach, reach) if axis == 2 else (reach, reach, 0, 0)
            x_B3HW = F.conv2d(F.pad(x_B3HW, pad, mode="reflect"), kernel, groups=3)
        return x_B3HW

    return blur


def picture(x_3HW: Tensor) -> NDArray[np.uint8]:
    """An image as it is shown: mean at middle grey, a tenth of the range for each standard deviation, as published."""
    x = x_3HW.double()
    shown = ((x - x.mean()) / (x.std(correction=0) + 1e-5) * 0.1 + 0.5).clamp(0, 1) * 255
    return shown.permute(1, 2, 0).to(torch.uint8).numpy()
