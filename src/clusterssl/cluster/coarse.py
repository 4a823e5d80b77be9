"""Nearest centroids by products in bfloat16, decided by exact ones where rounding leaves more than one candidate.

Processors with bfloat16 units take such products in half the time or less. Rounding moves a score by no more than a
bound that follows from the rounding errors of the rows and of the centroids (Cauchy-Schwarz); every centroid whose
rounded score comes within twice the bound of the row's best is scored again in float32, so that the answer is that of
float32 products. The order of bfloat16 numbers is that of their bits, where those of negative ones are turned over;
numpy searches integers several times faster than torch searches bfloat16.

Shape suffixes: n rows of a block, K centroids, D dimension (three more with offsets), P candidates.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FEWEST = 256
"""rows and centroids from which on this is worth its own steps"""
ELEMENTS = 2**21
"""scores of a block"""
_MOST_CANDIDATES = 16
_OF_OUTPUT = 2.0**-7
_OF_FLOAT32 = 2.0**-16


@functools.cache
def supported() -> bool:
    """Whether this processor has bfloat16 units that torch knows of."""
    asked = getattr(torch.cpu, "get_capabilities", dict[str, Any])()
    return bool(asked.get("avx512_bf16") or asked.get("amx_bf16"))


class Workspace:
    """Memory for the scores of a block and their comparison, taken once for all blocks of a search."""

    def __init__(self, rows: int, centroids: int) -> None:
        self.scores_nK = torch.empty(rows, centroids, dtype=torch.bfloat16)
        self.mask_nK = np.empty((rows, centroids), dtype=bool)


class Coarse(NamedTuple):
    """Centroids rounded, and what rounding did to them."""

    centroids_KD: Tensor
    """bfloat16; the offsets as three more columns, which together are exact"""
    longest: float
    """length of the longest exact centroid"""
    largest: float
    """offset, without its sign"""
    error: float
    """length of the largest rounding error"""


def coarse(centroids_KD: Tensor, offset_K: Tensor | None) -> Coarse:
    """Round centroids.

    Args:
        centroids_KD: float32.
        offset_K: what is taken off each product, or None.
    """
    rounded_KD = centroids_KD.bfloat16()
    error = float((centroids_KD - rounded_KD.float()).norm(dim=1).amax())
    longest, largest = float(centroids_KD.norm(dim=1).amax()), 0.0
    if offset_K is not None:
        largest = float(offset_K.abs().amax())
        rounded_KD = torch.cat([rounded_KD, _in_three(-offset_K)], dim=1)
    return Coarse(rounded_KD, longest, largest, error)


def _in_three(values_K: Tensor) -> Tensor:
    """bfloat16 [K, 3] whose rows sum to the float32 values."""
    parts, rest_K = [], values_K
    for _ in range(3):
        parts.append(rest_K.bfloat16())
        rest_K = rest_K - parts[-1].float()
    return torch.stack(parts, dim=1)


def candidates(x_nD: Tensor, given: Coarse, space: Workspace) -> tuple[Tensor, Tensor] | None:
    """Row and centroid [P] of every pair that may be nearest, in order; None where that is too many to be of use.

    Args:
        x_nD: float32 rows.
        given: of `coarse`.
        space: for at least so many rows.
    """
    rounded_nD = x_nD.bfloat16()
    exact_nD = rounded_nD.float()
    bound_n = (x_nD - exact_nD).norm(dim=1) * given.longest + exact_nD.norm(dim=1) * given.error
    bound_n += (x_nD.norm(dim=1) * given.longest + given.largest) * _OF_FLOAT32
    extra = given.centroids_KD.shape[1] - x_nD.shape[1]
    if extra:
        rounded_nD = torch.cat([rounded_nD, rounded_nD.new_ones(len(x_nD), extra)], dim=1)
    scores_nK = torch.mm(rounded_nD, given.centroids_KD.T, out=space.scores_nK[: len(x_nD)])
    bits_nK = scores_nK.view(torch.int16).numpy()
    high_n = bits_nK.max(1)
    if not (high_n > 0).all():
        high_n = _turn_negative(bits_nK).max(1)
    best_n = torch.from_numpy(_turn_negative(high_n)).view(torch.bfloat16).float()
    least_n = best_n - 2 * bound_n - best_n.abs() * _OF_OUTPUT
    floor_n = _turn_negative(least_n.bfloat16().view(torch.int16).numpy()) - 1
    flat = np.flatnonzero(np.greater_equal(bits_nK, floor_n[:, None], out=space.mask_nK[: len(x_nD)]))
    if len(flat) > _MOST_CANDIDATES * len(x_nD):
        return None
    row_P = flat // bits_nK.shape[1]
    return torch.from_numpy(row_P), torch.from_numpy(flat - row_P * bits_nK.shape[1])


def _turn_negative(bits: NDArray[np.int16]) -> NDArray[np.int16]:
    """In place, so that the order of integers is that of the numbers; once more, and they are as they were."""
    bits ^= (bits >> 15) & 0x7FFF
    return bits


def best_of(row_P: Tensor, centroid_P: Tensor, score_P: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Centroid and score of each row's best candidate, of equal ones the first."""
    best_n = score_P.new_full((rows,), -torch.inf).scatter_reduce_(0, row_P, score_P, "amax")
    none = torch.iinfo(torch.int64).max
    first_P = torch.where(score_P == best_n[row_P], centroid_P, none)
    return torch.full((rows,), none).scatter_reduce_(0, row_P, first_P, "amin"), best_n
