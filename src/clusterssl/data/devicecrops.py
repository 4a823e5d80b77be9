"""Crops cut on the training device, whole batches at once: the same bits as `boxes.resized_crop`.

The resize is a product with one matrix per axis, of integers (see `resizing`). Each weight is split into two bytes, so
that all factors have 8 bits and all sums fewer than 24: exact in float32, in whatever mode a GPU multiplies.

Suffixes: N images, P pixels of all, B rows of a batch, V views, C crops, H x W pixels of a box, h x w of the crop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clusterssl.data.boxes import Interpolation
from clusterssl.data.color import to_device
from clusterssl.data.resizing import spread, taps_of

_CHUNK_ELEMENTS = {"cpu": 2**21, "other": 2**26}  # what stays in a cache; what bounds a GPU's working memory


@dataclass(frozen=True)
class Pixels:
    """Images of any sizes, pixel behind pixel."""

    flat_P3: Tensor
    """uint8, on the device"""
    height_N: NDArray[np.int64]
    width_N: NDArray[np.int64]
    start_N: NDArray[np.int64]
    """first pixel of each image"""

    @classmethod
    def of(cls, images: Sequence[Tensor]) -> Pixels:
        """Images uint8 [3, H, W] of one device."""
        flat_P3 = torch.cat([image.permute(1, 2, 0).reshape(-1, 3) for image in images])
        shapes = np.array([image.shape[1:] for image in images], dtype=np.int64)
        areas = shapes.prod(axis=1)
        return cls(flat_P3, shapes[:, 0], shapes[:, 1], np.cumsum(areas) - areas)

    def image(self, i: int) -> Tensor:
        """Image i, uint8 [3, H, W]; a view."""
        height, width, start = (int(values[i]) for values in (self.height_N, self.width_N, self.start_N))
        return self.flat_P3[start : start + height * width].view(height, width, 3).permute(2, 0, 1)


@torch.no_grad()
def device_crops(
    pixels: Pixels,
    rows_B: NDArray[np.int64],
    boxes_BV4: NDArray[np.int64],
    sizes: Sequence[tuple[int, int]],
    interpolation: Interpolation = "bilinear",
) -> list[Tensor]:
    """Takes the crops of all views.

    Args:
        pixels: images.
        rows_B: which of them.
        boxes_BV4: top, left, height, width of each crop.
        sizes: height, width of each of the V results.
        interpolation: as `boxes.resized_crop`.

    Returns:
        V tensors uint8 [B, 3, h, w], on the device of the pixels.
    """
    images_B2 = np.stack([pixels.start_N[rows_B], pixels.width_N[rows_B]], axis=-1)
    out: list[Tensor] = []
    for size, views in groupby(range(len(sizes)), key=lambda view: sizes[view]):
        group = list(views)
        boxes_C4 = np.concatenate([boxes_BV4[:, view] for view in group])
        places_C6 = np.concatenate([np.tile(images_B2, (len(group), 1)), boxes_C4], axis=1)
        chunks = _chunks(pixels.flat_P3.device, boxes_C4, size)
        parts = [_crops(pixels.flat_P3, places_C6[some], size, interpolation) for some in chunks]
        crops = parts[0] if len(parts) == 1 else torch.cat(parts)
        if len(chunks) > 1:
            crops = crops[to_device(np.concatenate(chunks).argsort(), crops.device)]
        out += crops.split(len(rows_B))
    return out


def _chunks(device: torch.device, boxes_C4: NDArray[np.int64], size: tuple[int, int]) -> list[NDArray[np.int64]]:
    """Rows that are cut at once: all in their order if they fit; else from small to large, as many as fit."""
    limit = _CHUNK_ELEMENTS.get(device.type, _CHUNK_ELEMENTS["other"])

    def elements(count: int, high: int, wide: int) -> int:
        return count * 3 * high * (wide + 2 * size[1])

    if elements(len(boxes_C4), *boxes_C4[:, 2:].max(axis=0).tolist()) <= limit:
        return [np.arange(len(boxes_C4))]
    order = boxes_C4[:, 2:].prod(axis=1).argsort(kind="stable")
    cuts, first, high, wide = [], 0, 0, 0
    for place, (h, w) in enumerate(boxes_C4[order, 2:].tolist()):
        high, wide = max(high, h), max(wide, w)
        if place > first and elements(place + 1 - first, high, wide) > limit:
            cuts.append(place)
            first, high, wide = place, h, w
    return np.split(order, cuts)


def _crops(flat_P3: Tensor, places_C6: NDArray[np.int64], size: tuple[int, int], how: Interpolation) -> Tensor:
    """uint8 [C, 3, h, w]; places: first pixel and width of the image, and the box."""
    high, wide = (int(x) for x in places_C6[:, 4:].max(axis=0))
    places = to_device(places_C6.T, flat_P3.device)
    box_CHW3 = _cut(flat_P3, places, high, wide)
    count, (h, w) = len(places_C6), size
    across, bits_across = _bytes(places[5], wide, w, how)
    down, bits_down = _bytes(places[4], high, h, how)
    with torch.autocast(flat_P3.device.type, enabled=False):
        box = box_CHW3.permute(0, 1, 3, 2).to(torch.float32, memory_format=torch.contiguous_format)
        sums = box.view(count, high * 3, wide) @ across.transpose(1, 2)
        rows = _rounded(sums[..., :w], sums[..., w:], bits_across).to(torch.float32).view(count, high, 3 * w)
        sums = down @ rows
    crop = _rounded(sums[:, :h], sums[:, h:], bits_down).to(torch.uint8)
    return crop.view(count, h, 3, w).permute(0, 2, 1, 3)


def _cut(flat_P3: Tensor, places: Tensor, high: int, wide: int) -> Tensor:
    """Boxes uint8 [C, H, W, 3]; those smaller than H x W repeat their last row and column."""
    start, width, top, left, h, w = places[..., None]
    y = top + torch.minimum(torch.arange(high, device=places.device), h - 1)
    x = left + torch.minimum(torch.arange(wide, device=places.device), w - 1)
    return flat_P3[(start + y * width)[:, :, None] + x[:, None]]


def _bytes(length_C: Tensor, longest: int, out: int, how: Interpolation) -> tuple[Tensor, Tensor]:
    """High bytes above low bytes of the weights, float32 [C, 2 out, longest], and their bits, int32 [C, 1, 1]."""
    first, whole, bits = taps_of(length_C, longest, out, how)
    upper = (whole / 256).floor()
    halves = torch.cat([upper, whole - 256 * upper], dim=1).float()
    return spread(first.repeat(1, 2), halves, longest), bits.int()[:, None, None]


def _rounded(upper: Tensor, lower: Tensor, bits: Tensor) -> Tensor:
    """int32 0..255 from the sums of both bytes."""
    half = torch.bitwise_left_shift(torch.ones_like(bits), bits - 1)
    return torch.bitwise_right_shift(upper.int() * 256 + lower.int() + half, bits).clamp_(0, 255)
