"""Batched augmentation on the training device: uint8 crops in, normalised float images out.

All random choices were made with the crops (params.py) and arrive on the CPU, so every index set is known there and
nothing ever waits for the device. Operations no image of a batch needs are skipped. Order as published: flip, colour
jitter, grey, blur, solarize, normalise.

Suffixes: V views, B rows of a batch, N images, P parameters, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from clusterssl.data.blur import gaussian_blur
from clusterssl.data.color import jitter, luma, replace_rows, solarize, to_device
from clusterssl.data.fused import Fused
from clusterssl.data.params import Param

MEAN = (0.485, 0.456, 0.406)
STD = (0.228, 0.224, 0.225)
"""SwAV normalises with 0.228 where ImageNet's usual figure is 0.229; its weights expect that."""

_CHUNK_ELEMENTS = {"cpu": 2**18, "other": 2**26}  # what stays in a core's cache; what bounds a GPU's working memory


def normalize(
    images: Tensor, mean: Sequence[float] = MEAN, std: Sequence[float] = STD, *, white: float = 255.0
) -> Tensor:
    """Images [N, 3, H, W] with values in 0..white -> float32, (x / white - mean) / std."""
    x = images.to(torch.float32, memory_format=torch.contiguous_format)
    scale = to_device(1 / (white * np.asarray(std, dtype=np.float64)), x.device).float()
    bias = to_device(-np.asarray(mean, dtype=np.float64) / np.asarray(std, dtype=np.float64), x.device).float()
    return torch.addcmul(bias[:, None, None], x, scale[:, None, None])


class Augment(nn.Module):
    """Applies drawn augmentations to batches of crops."""

    def __init__(self, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> None:
        super().__init__()
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.fused: Fused | None = None

    def fuse(self, layout: torch.memory_format = torch.contiguous_format) -> Augment:
        """This augmentation, from now on compiled, its results in that memory format: one graph for each crop size."""
        self.fused = Fused(self.mean, self.std, layout)
        return self

    @torch.no_grad()
    def forward(
        self, crops: Sequence[Tensor], params_VBP: Tensor, device: torch.device | str | None = None
    ) -> list[Tensor]:
        """Augments all views of a batch.

        Args:
            crops: V tensors uint8 [B, 3, h, w]; left as they are.
            params_VBP: float32 [V, B, P] on the CPU.
            device: where to work; by default where the crops are.

        Returns:
            V tensors float32 [B, 3, h, w] on the device, normalised.
        """
        device = torch.device(device) if device is not None else crops[0].device
        params = params_VBP.numpy()
        out: list[Tensor] = []
        for _, views in groupby(range(len(crops)), key=lambda v: crops[v].shape):
            group = list(views)
            moved = [crops[v].to(device, non_blocking=True) for v in group]
            x_N3HW = moved[0] if len(group) == 1 else torch.cat(moved)
            params_NP = params[group].reshape(len(x_N3HW), -1)
            chosen: Callable[[Tensor, NDArray[np.float32]], Tensor] = self.fused or self._augment
            limit = _CHUNK_ELEMENTS["cpu" if device.type == "cpu" and self.fused is None else "other"]
            chunks = [chosen(x_N3HW[rows], params_NP[rows]) for rows in _chunks(x_N3HW, limit)]
            whole = chunks[0] if len(chunks) == 1 else torch.cat(chunks)
            out += whole.split(len(crops[group[0]]))
        return out

    def _augment(self, x_N3HW: Tensor, params_NP: NDArray[np.float32]) -> Tensor:
        flip_N = params_NP[:, Param.FLIP] > 0
        if flip_N.any():
            x_N3HW = torch.where(to_device(flip_N, x_N3HW.device)[:, None, None, None], x_N3HW.flip(-1), x_N3HW)
        colours = [Param.BRIGHTNESS, Param.CONTRAST, Param.SATURATION]
        jitter_N = (params_NP[:, Param.JITTER] > 0) & (
            (params_NP[:, colours] != 1).any(axis=1) | (params_NP[:, Param.HUE] != 0)
        )
        wanted = (jitter_N, *(params_NP[:, column] > 0 for column in (Param.GRAY, Param.SIGMA, Param.SOLARIZE)))
        if not np.any(wanted):
            return normalize(x_N3HW, self.mean, self.std)
        x_N3HW = x_N3HW.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        jittered, grey, blurred, solarized = (np.flatnonzero(rows) for rows in wanted)
        x_N3HW = replace_rows(x_N3HW, jittered, partial(jitter, params_NP=params_NP[jittered]))
        x_N3HW = replace_rows(x_N3HW, grey, lambda x: luma(x).repeat(1, 3, 1, 1))
        x_N3HW = replace_rows(x_N3HW, blurred, partial(gaussian_blur, radius_N=params_NP[blurred, Param.SIGMA]))
        x_N3HW = replace_rows(x_N3HW, solarized, solarize)
        return normalize(x_N3HW, self.mean, self.std, white=1.0)


def _chunks(x_N3HW: Tensor, limit: int) -> Iterator[slice]:
    rows = max(1, limit // max(x_N3HW[0].numel(), 1))
    for start in range(0, len(x_N3HW), rows):
        yield slice(start, start + rows)
