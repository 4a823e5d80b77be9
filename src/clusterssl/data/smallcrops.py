"""Crops of many small images of equal size at once: the same bits as `boxes.resized_crop`, a fraction of the time.

An antialiased resize is a product with one matrix per axis, of integers (see `resizing`). These are exact in float32 as
long as their products and sums stay below 2^24 (of the cubic kernel, in float64), whatever the order of summation, so
batched float matrix products give identical bits on every machine.

Suffixes: B rows of a batch, H x W pixels of the image, h x w of the crop.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clusterssl.data.boxes import SMALL_SIDE, Interpolation
from clusterssl.data.resizing import power_of_two, spread, taps_of

MAX_REDUCTION = 2
"""Up to this factor the rounded weights have at most 16 fractional bits, which float32 holds exactly with a pixel."""
_BITS = 16


def is_small(height: int, width: int, sizes: tuple[tuple[int, int], ...]) -> bool:
    """Whether crops of these sizes from images of H x W can be taken this way."""
    fits = all(height <= MAX_REDUCTION * h and width <= MAX_REDUCTION * w for h, w in sizes)
    return fits and max(height, width, *(side for size in sizes for side in size)) <= SMALL_SIDE


_EXACT = {"bilinear": torch.float32, "bicubic": torch.float64}  # cubic weights have both signs and larger sums


@lru_cache(maxsize=32)
def _table(side: int, out: int, interpolation: Interpolation) -> Tensor:
    """Weights of every box length, padded for every box start: a view [length, start, out, side]."""
    first, whole, bits = taps_of(torch.arange(1, side + 1), side, out, interpolation)
    assert interpolation == "bicubic" or int(bits.max()) <= _BITS, "float32 would round"
    table = torch.zeros(side + 1, out, 2 * side, dtype=_EXACT[interpolation])
    table[1:, :, side:] = spread(first, whole / power_of_two(bits)[:, None, None], side)
    return table.unfold(2, side, 1).permute(0, 2, 1, 3)


def _weights(
    side: int, out: int, start_B: NDArray[np.int64], length_B: NDArray[np.int64], interpolation: Interpolation
) -> Tensor:
    """[B, out, side]: zero outside the box."""
    return _table(side, out, interpolation)[torch.from_numpy(length_B), torch.from_numpy(side - start_B)]


def small_crops(
    images_B3HW: Tensor,
    boxes_BV4: NDArray[np.int64],
    sizes: tuple[tuple[int, int], ...],
    interpolation: Interpolation = "bilinear",
) -> list[Tensor]:
    """Takes the crops of all views.

    Args:
        images_B3HW: uint8, small by `is_small`.
        boxes_BV4: top, left, height, width of each crop.
        sizes: height, width of each of the V results.
        interpolation: as `boxes.resized_crop`.

    Returns:
        V tensors uint8 [B, 3, h, w].
    """
    count, _, height, width = images_B3HW.shape
    pixels = images_B3HW.permute(0, 2, 1, 3).to(_EXACT[interpolation], memory_format=torch.contiguous_format)
    pixels_BHW = pixels.view(count, height * 3, width)
    crops = []
    for view, (h, w) in enumerate(sizes):
        top, left, box_h, box_w = np.ascontiguousarray(boxes_BV4[:, view].T)
        rows = pixels_BHW @ _weights(width, w, left, box_w, interpolation).transpose(1, 2)
        rows = rows.add_(0.5).floor_().clamp_(0, 255).view(count, height, 3 * w)
        crop = (_weights(height, h, top, box_h, interpolation) @ rows).add_(0.5).clamp_(0, 255)
        crops.append(crop.view(count, h, 3, w).to(torch.uint8).permute(0, 2, 1, 3))
    return crops
