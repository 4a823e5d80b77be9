"""Gaussian blur of a batch, each image with its own radius, as PIL's ImageFilter.GaussianBlur does it.

PIL approximates the Gaussian by three box blurs with fractional edges (Gwosdek et al. 2011, equations 7, 11, 14); in
each, pixels beyond the border repeat the border. A box blur along an axis of n pixels is an n x n matrix M, so that a
blur is two batched matrix products, with M^3 of the rows and M^3 of the columns.

Suffixes: N images, T taps, H x W pixels.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clusterssl.data.color import to_device

_PASSES = 3


def box_kernels(radius_N: NDArray[np.float32]) -> NDArray[np.float64]:
    """One pass of PIL's blur for each radius in pixels, [N, T] with T odd; rows sum to 1."""
    radius = radius_N.astype(np.float64)
    variance = radius**2 / _PASSES
    whole = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    reach = int(whole.max()) + 1
    distance = np.abs(np.arange(-reach, reach + 1))
    box = np.where(distance <= whole[:, None], 1.0, np.where(distance == whole[:, None] + 1, part[:, None], 0.0))
    return box / (2 * (whole + part) + 1)[:, None]


@lru_cache(maxsize=32)
def _places(n: int, reach: int, device: torch.device) -> Tensor:
    """Where entry (i, j) of the n x n matrix of one pass stands in a table row, int64 [n * n].

    A table row holds the T taps, one zero, and the running sums of the taps: a border column collects every tap that
    falls beyond it.
    """
    taps = 2 * reach + 1
    i, j = np.mgrid[:n, :n]
    inside = np.abs(j - i) <= reach
    places = np.where(inside, j - i + reach, taps)
    places = np.where((j == 0) & inside, taps + 1 + reach - i, places)
    places = np.where((j == n - 1) & inside, taps + 1 + reach - (n - 1 - i), places)
    return to_device(places.reshape(-1), device)


def blur_matrices(table: Tensor, n: int) -> Tensor:
    """Matrices with blurred = M^3 x along an axis of n pixels, [N, n, n], from rows of `_table`."""
    if n == 1:
        return table.new_ones(len(table), 1, 1)
    reach = (table.shape[1] - 3) // 4
    once = table.index_select(1, _places(n, reach, table.device)).view(-1, n, n)
    return once @ once @ once


def _table(kernel_NT: NDArray[np.float64]) -> NDArray[np.float32]:
    zero = np.zeros((len(kernel_NT), 1))
    return np.concatenate([kernel_NT, zero, kernel_NT.cumsum(axis=1)], axis=1).astype(np.float32)


def gaussian_blur(x_N3HW: Tensor, radius_N: NDArray[np.float32]) -> Tensor:
    """Blurs float images [N, 3, H, W]; radius in pixels, above 0."""
    n, channels, height, width = x_N3HW.shape
    table = to_device(_table(box_kernels(radius_N)), x_N3HW.device)
    with torch.autocast(x_N3HW.device.type, enabled=False):
        across = blur_matrices(table, width)
        down = across if height == width else blur_matrices(table, height)
        rows = x_N3HW.reshape(n, channels * height, width) @ across.transpose(1, 2)
        return down[:, None] @ rows.view(n, channels, height, width)
