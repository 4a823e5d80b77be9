"""Random resized crops: drawing the boxes and cutting them out of decoded images.

Suffixes: N images, V views, T tries, B rows of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn import functional as F

Interpolation = Literal["bilinear", "bicubic"]
TRIES = 10
SMALL_SIDE = 64
BOX_SLOTS = 2 * TRIES + 2


def random_boxes(
    u_NVS: NDArray[np.float64],
    height: ArrayLike,
    width: ArrayLike,
    scale: NDArray[np.float64],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> NDArray[np.int64]:
    """Boxes by the algorithm of torchvision's RandomResizedCrop.

    Area fraction uniform in `scale`, aspect ratio log-uniform in `ratio`; the first of ten tries that fits is placed
    uniformly; if none fits, the largest centred box whose ratio is allowed. The aspect ratio is that of the box, also
    when the crop is not square (as in torchvision).

    Args:
        u_NVS: uniform draws [N, V, BOX_SLOTS]: ten of the area, ten of the ratio, top, left.
        height, width: size of each image, [N] or one number.
        scale: smallest and largest area fraction of each view, [V, 2].
        ratio: smallest and largest width / height.

    Returns:
        int64 [N, V, 4]: top, left, height, width in pixels.
    """
    h_N1, w_N1 = (np.asarray(x, dtype=np.float64).reshape(-1, 1) for x in (height, width))
    low, high = scale[:, 0, None], scale[:, 1, None]
    area = (h_N1 * w_N1)[..., None] * (low + (high - low) * u_NVS[..., :TRIES])
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    aspect = np.exp(log_low + (log_high - log_low) * u_NVS[..., TRIES : 2 * TRIES])
    w_NVT, h_NVT = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (w_NVT > 0) & (w_NVT <= w_N1[..., None]) & (h_NVT > 0) & (h_NVT <= h_N1[..., None])
    first = fits.argmax(axis=-1)[..., None]
    h_NV = np.take_along_axis(h_NVT, first, axis=-1)[..., 0]
    w_NV = np.take_along_axis(w_NVT, first, axis=-1)[..., 0]
    top = np.floor(u_NVS[..., 2 * TRIES] * (h_N1 - h_NV + 1))
    left = np.floor(u_NVS[..., 2 * TRIES + 1] * (w_N1 - w_NV + 1))
    boxes = np.stack([top, left, h_NV, w_NV], axis=-1)
    failed = ~fits.any(axis=-1)
    if failed.any():
        boxes[failed] = np.broadcast_to(_centre_boxes(h_N1, w_N1, ratio), boxes.shape)[failed]
    return boxes.astype(np.int64)


def _centre_boxes(h_N1: NDArray[np.float64], w_N1: NDArray[np.float64], ratio: tuple[float, float]) -> NDArray:
    aspect = w_N1 / h_N1
    h = np.where(aspect < ratio[0], np.rint(w_N1 / ratio[0]), h_N1)
    w = np.where(aspect > ratio[1], np.rint(h_N1 * ratio[1]), w_N1)
    return np.stack([(h_N1 - h) // 2, (w_N1 - w) // 2, h, w], axis=-1)


def resized_crop(
    image: Tensor, box: ArrayLike, size: tuple[int, int], interpolation: Interpolation = "bilinear"
) -> Tensor:
    """Cuts a box out and resizes it, with antialiasing in integer arithmetic.

    Args:
        image: uint8 [3, H, W].
        box: top, left, height, width.
        size: height, width of the result.
        interpolation: bilinear, or bicubic with PIL's kernel (a = -0.5).

    Returns:
        uint8 [3, h, w], strided channels-last (three times as fast as planar).
    """
    top, left, h, w = (int(x) for x in np.asarray(box))
    crop = image[None, :, top : top + h, left : left + w].contiguous(memory_format=torch.channels_last)
    if (h, w) == size:
        return crop[0]
    return F.interpolate(crop, size=size, mode=interpolation, antialias=True)[0]


def empty_crops(rows: int, size: tuple[int, int]) -> Tensor:
    """Uninitialised uint8 [rows, 3, h, w]; small ones planar, others channels-last as `resized_crop` delivers."""
    return crops_in(torch.empty(buffer_bytes(rows, [size]), dtype=torch.uint8), rows, [size])[0]


def buffer_bytes(rows: int, sizes: Sequence[tuple[int, int]]) -> int:
    """Bytes that `rows` crops of each of the sizes take behind one another."""
    return sum(_aligned(3 * rows * h * w) for h, w in sizes)


def crops_in(buffer: Tensor, rows: int, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Views uint8 [rows, 3, h, w] of a buffer of `buffer_bytes`, one for each size, laid out as `empty_crops`."""
    views, start = [], 0
    for h, w in sizes:
        pixels = buffer[start : start + 3 * rows * h * w]
        small = max(h, w) <= SMALL_SIDE
        views.append(pixels.view(rows, 3, h, w) if small else pixels.view(rows, h, w, 3).permute(0, 3, 1, 2))
        start += _aligned(3 * rows * h * w)
    return views


def _aligned(count: int) -> int:
    return -(-count // 64) * 64
