"""Gaussian blur of a batch, each image with its own radius, as PIL's ImageFilter.GaussianBlur does it.

PIL approximates the Gaussian by three box blurs with fractional edges (Gwosdek et al. 2011, equations 7, 11, 14); in
each, pixels beyond the border repeat the border. A box blur along an axis of n pixels is an n x n matrix M, so that a
blur is two batched matrix products, with M^3 of the rows and M^3 of the columns.

Suffixes: N images, T taps, H x W pixels.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clusterssl.data.color import to_device

_PASSES = 3


def box_kernels(radius_N: NDArray[np.float32], least_reach: int = 0) -> NDArray[np.float64]:
    """One pass of PIL's blur for each radius in pixels, [N, T] with T odd and above 2 `least_reach`; rows sum to 1."""
    radius = radius_N.astype(np.float64)
    variance = radius**2 / _PASSES
    whole = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    reach = max(int(whole.max()) + 1, least_reach)
    distance = np.abs(np.arange(-reach, reach + 1))
    box = np.where(distance <= whole[:, None], 1.0, np.where(distance == whole[:, None] + 1, part[:, None], 0.0))
    return box / (2 * (whole + part) + 1)[:, None]


@lru_cache(maxsize=32)
def blur_places(n: int, reach: int, device: torch.device) -> Tensor:
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


def blur_tables(radius_N: NDArray[np.float32], least_reach: int = 0) -> NDArray[np.float32]:
    """Table rows of these radii in pixels, see `blur_places`; radius 0 blurs nothing."""
    kernel_NT = box_kernels(radius_N, least_reach)
    zero = np.zeros((len(kernel_NT), 1))
    return np.concatenate([kernel_NT, zero, kernel_NT.cumsum(axis=1)], axis=1).astype(np.float32)


def blur_matrices(tables_NT: Tensor, places: Tensor) -> Tensor:
    """Matrices with blurred = M^3 x along an axis, [N, n, n], from `blur_tables` and `blur_places` of n pixels."""
    n = math.isqrt(len(places))
    if n == 1:
        return tables_NT.new_ones(len(tables_NT), 1, 1)
    once = tables_NT.index_select(1, places).view(-1, n, n)
    return once @ once @ once


def blur_axes(x_N3HW: Tensor, tables_NT: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """Blurs float images, given the places of both axes."""
    n, channels, height, width = x_N3HW.shape
    across_NWW = blur_matrices(tables_NT, across)
    down_NHH = across_NWW if height == width else blur_matrices(tables_NT, down)
    rows = x_N3HW.reshape(n, channels * height, width) @ across_NWW.transpose(1, 2)
    return down_NHH[:, None] @ rows.view(n, channels, height, width)


def gaussian_blur(x_N3HW: Tensor, radius_N: NDArray[np.float32]) -> Tensor:
    """Blurs float images [N, 3, H, W]; radius in pixels, above 0."""
    tables = blur_tables(radius_N)
    places = [blur_places(side, (tables.shape[1] - 3) // 4, x_N3HW.device) for side in x_N3HW.shape[2:]]
    with torch.autocast(x_N3HW.device.type, enabled=False):
        return blur_axes(x_N3HW, to_device(tables, x_N3HW.device), *places)
