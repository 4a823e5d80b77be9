"""Colour operations on batches of float images, each image with its own strength.

Equal to torchvision's float functionals (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue,
rgb_to_grayscale, solarize). Images are float32 [N, 3, H, W] in [0, 1].

Suffixes: N images, R rounds of the jitter, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clusterssl.data.params import JITTER_ORDERS, Param

_LUMA = (0.2989, 0.587, 0.114)  # torchvision's weights
_SOLARIZE_FROM = 128 / 255
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def to_device(array: NDArray, device: torch.device) -> Tensor:
    """Copies a small array to the device without waiting for it."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def luma(x_N3HW: Tensor) -> Tensor:
    """Grey value, [N, 1, H, W]."""
    r, g, b = x_N3HW.split(1, dim=1)
    return torch.mul(r, _LUMA[0]).add_(g, alpha=_LUMA[1]).add_(b, alpha=_LUMA[2])


def shift_hue(x_N3HW: Tensor, shift_N: Tensor) -> Tensor:
    """Rotates the hue by a fraction of the circle.

    Uses channel_n = max - (max - min) * clamp(min(k, 4 - k), 0, 1) with k = (n + 6 hue) mod 6 and n = 5, 3, 1, which
    is the usual way to HSV and back without the six cases.
    """
    r, g, b = x_N3HW.unbind(1)
    high, low = x_N3HW.amax(1), x_N3HW.amin(1)
    span = high - low
    inverse = span.clamp_min(1e-12).reciprocal_()  # grey pixels: every difference below is 0
    sixths = torch.where(g == high, 2 + (b - r) * inverse, 4 + (r - g) * inverse)
    sixths = torch.where(r == high, (g - b) * inverse, sixths)
    sixths += 6 * shift_N[:, None, None]
    channel = torch.arange(5, 0, -2, device=x_N3HW.device, dtype=x_N3HW.dtype)
    k = (sixths[:, None] + channel[:, None, None]).remainder_(6)
    k = torch.minimum(k, 4 - k).clamp_(0, 1)
    return torch.addcmul(high[:, None], span[:, None], k, value=-1)


def solarize(x_N3HW: Tensor) -> Tensor:
    """Inverts values of 128 / 255 and more."""
    return torch.where(x_N3HW >= _SOLARIZE_FROM, 1 - x_N3HW, x_N3HW)


@dataclass(frozen=True)
class JitterPlan:
    """What each of the four rounds does to each image.

    Brightness, contrast and saturation are one formula: clamp(f x + (1 - f) reference), with reference 0, the mean grey
    value, the grey image. An image whose turn is the hue keeps f = 1.
    """

    factor_RN: NDArray[np.float32]
    toward_gray_RN: NDArray[np.float32]
    toward_mean_RN: NDArray[np.float32]
    hue_rows: list[NDArray[np.int64]]
    hue_N: NDArray[np.float32]

    @classmethod
    def of(cls, params_NP: NDArray[np.float32]) -> JitterPlan:
        """Reads the plan from the parameters of the images to be jittered."""
        op_RN = JITTER_ORDERS[params_NP[:, Param.ORDER].astype(np.int64)].T
        columns = [Param.BRIGHTNESS, Param.CONTRAST, Param.SATURATION, Param.HUE]
        factor_RN = np.take_along_axis(params_NP[:, columns].T, op_RN, axis=0)
        hue_N = params_NP[:, Param.HUE]
        rows = [np.flatnonzero((op_N == HUE) & (hue_N != 0)) for op_N in op_RN]
        factor_RN = np.where(op_RN == HUE, np.float32(1), factor_RN)
        rest_RN = np.float32(1) - factor_RN
        return cls(
            factor_RN,
            np.where(op_RN == SATURATION, rest_RN, np.float32(0)),
            np.where(op_RN == CONTRAST, rest_RN, np.float32(0)),
            rows,
            hue_N,
        )


def jitter(x_N3HW: Tensor, params_NP: NDArray[np.float32]) -> Tensor:
    """Brightness, contrast, saturation and hue in each image's own order."""
    plan = JitterPlan.of(params_NP)
    device = x_N3HW.device
    coefficients = np.stack([plan.factor_RN, plan.toward_gray_RN, plan.toward_mean_RN])
    factor, to_gray, to_mean = to_device(coefficients, device)[..., None, None, None]
    for turn, rows in enumerate(plan.hue_rows):
        if np.any(plan.factor_RN[turn] != 1):
            gray = luma(x_N3HW)
            mean = gray.mean((1, 2, 3), keepdim=True)
            reference = torch.addcmul(mean * to_mean[turn], gray, to_gray[turn])
            x_N3HW = torch.addcmul(reference, x_N3HW, factor[turn]).clamp_(0, 1)
        if len(rows):
            shift = partial(shift_hue, shift_N=to_device(plan.hue_N[rows], device))
            x_N3HW = replace_rows(x_N3HW, rows, shift)
    return x_N3HW


def replace_rows(x: Tensor, rows: NDArray[np.int64], operation: Callable[[Tensor], Tensor]) -> Tensor:
    """Applies an operation to some rows of a batch; may write to `x`."""
    if len(rows) == 0:
        return x
    if len(rows) == len(x):
        return operation(x)
    index = to_device(rows, x.device)
    return x.index_copy_(0, index, operation(x.index_select(0, index)))
