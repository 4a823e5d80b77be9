"""The augmentation of `augment.Augment` as one compiled graph for each crop size, the number of images left open.

Whatever an image does not need is computed and not taken, but for the blur, whose images are known beforehand. Contrast
needs the mean of an image as the operations before it have left it: they are computed twice, once for that mean.

Suffixes: N images, M images to be blurred, R rounds of the jitter, C columns, T table columns, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clusterssl.data.blur import blur_axes, blur_places, blur_tables
from clusterssl.data.color import CONTRAST, HUE, JitterPlan, luma, shift_hue, solarize, to_device
from clusterssl.data.params import JITTER_ORDERS, Param

_SLOTS, _KINDS = 3, 5  # rounds on either side of the hue; columns of a round
_LEAST_ROWS = 2  # graphs for one image or none would be graphs of their own
_LEAST_REACH = 2  # of the blur's tables, enough for a radius of 2


class Fused:
    """Compiled augmentation."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], layout: torch.memory_format) -> None:
        """Args: of the channels, for the normalisation; memory format of the results."""
        self.mean, self.std, self.layout = mean, std, layout

    def __call__(self, x_N3HW: Tensor, params_NP: NDArray[np.float32]) -> Tensor:
        """Augmented images float32 [N, 3, H, W] from uint8 ones."""
        count, _, height, width = x_N3HW.shape
        if count < _LEAST_ROWS:
            x_N3HW, params_NP = x_N3HW.repeat(_LEAST_ROWS, 1, 1, 1), params_NP.repeat(_LEAST_ROWS, axis=0)
        device = x_N3HW.device
        rows_M, radius_M = _blurred(params_NP)
        tables = blur_tables(radius_M, _LEAST_REACH)
        reach = (tables.shape[1] - 3) // 4
        places = [blur_places(side, reach, device) for side in (height, width)]
        open_sized = [x_N3HW, *(to_device(array, device) for array in (_columns(params_NP), rows_M, tables))]
        for tensor in open_sized:
            torch._dynamo.mark_dynamic(tensor, 0)
        norm = to_device(_normalisation(tuple(self.mean), tuple(self.std)), device)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            return _compiled()(*open_sized, *places, norm, self.layout)[:count]


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_chain, fullgraph=True, dynamic=False)


def _blurred(params_NP: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Images to be blurred and their radii; at least two and another number than N, the first ones repeated."""
    rows = np.flatnonzero(params_NP[:, Param.SIGMA] > 0)
    if len(rows) == 0:
        rows = np.zeros(1, dtype=np.int64)
    while len(rows) < _LEAST_ROWS or len(rows) == len(params_NP):
        rows = np.append(rows, rows[0])
    return rows, params_NP[rows, Param.SIGMA]


def _columns(params_NP: NDArray[np.float32]) -> NDArray[np.float32]:
    """What each image needs, float32 [N, C]: flip, grey, solarize, hue, hue if before the contrast; then what three
    rounds before the hue and three after it do, one that an image does not have being idle."""
    params_NP = params_NP.copy()
    still = params_NP[:, Param.JITTER] == 0
    params_NP[np.ix_(still, [Param.BRIGHTNESS, Param.CONTRAST, Param.SATURATION])] = 1
    params_NP[still, Param.HUE] = 0
    plan = JitterPlan.of(params_NP)
    op_RN = JITTER_ORDERS[params_NP[:, Param.ORDER].astype(np.int64)].T
    contrast_N, hue_N = ((op_RN == op).argmax(axis=0) for op in (CONTRAST, HUE))
    early_N = np.where(hue_N < contrast_N, params_NP[:, Param.HUE], np.float32(0))
    columns = [params_NP[:, column] for column in (Param.FLIP, Param.GRAY, Param.SOLARIZE, Param.HUE)] + [early_N]
    for slot in range(2 * _SLOTS):
        turn = slot if slot < _SLOTS else slot - _SLOTS + 1
        has_N = turn < hue_N if slot < _SLOTS else turn > hue_N
        early = has_N & (turn < contrast_N)
        columns += [np.where(has, plan.factor_RN[turn], np.float32(1)) for has in (has_N, early)]
        columns += [np.where(has, plan.toward_gray_RN[turn], np.float32(0)) for has in (has_N, early)]
        columns += [np.where(has_N, plan.toward_mean_RN[turn], np.float32(0))]
    return np.stack(columns, axis=1)


def _normalisation(mean: tuple[float, ...], std: tuple[float, ...]) -> NDArray[np.float32]:
    """Scale and bias of each channel, [2, 3, 1, 1]."""
    exact = np.stack([1 / np.asarray(std), -np.asarray(mean) / np.asarray(std)])
    return exact.astype(np.float32)[..., None, None]


def _chain(
    x_N3HW: Tensor, columns_NC: Tensor, rows_M: Tensor, tables_MT: Tensor, down: Tensor, across: Tensor, norm: Tensor,
    layout: torch.memory_format,
) -> Tensor:  # fmt: skip
    flip, grey, dark, hue, early_hue, *rounds = columns_NC[..., None, None, None].unbind(1)
    x = torch.where(flip > 0, x_N3HW.flip(-1), x_N3HW).to(torch.float32) / 255
    factor, early_factor, to_gray, early_to_gray, to_mean = (rounds[kind::_KINDS] for kind in range(_KINDS))
    early = _jittered(x, early_hue, early_factor, early_to_gray)
    means = [luma(early).mean((1, 2, 3), keepdim=True) * weight for weight in to_mean]
    x = _jittered(x, hue, factor, to_gray, means)
    x = torch.where(grey > 0, luma(x), x)
    x = x.index_copy(0, rows_M, blur_axes(x.index_select(0, rows_M), tables_MT, down, across))
    x = torch.where(dark > 0, solarize(x), x)
    return torch.addcmul(norm[1], x, norm[0]).contiguous(memory_format=layout)


def _jittered(
    x: Tensor, hue: Tensor, factor: list[Tensor], to_gray: list[Tensor], means: list[Tensor] | None = None
) -> Tensor:
    for slot in range(2 * _SLOTS):
        if slot == _SLOTS:
            x = torch.where(hue != 0, shift_hue(x, hue[:, 0, 0, 0]), x)
        reference = luma(x) * to_gray[slot]
        reference = reference if means is None else reference + means[slot]
        x = torch.addcmul(reference, x, factor[slot]).clamp(0, 1)
    return x
