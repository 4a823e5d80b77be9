"""PCA with whitening of rows that are spread over ranks, as DeepCluster prepares features for clustering.

Caron et al. 2018, https://arxiv.org/abs/1807.05520, section 4.1: "PCA-reduced to 256 dimensions, whitened and
l2-normalized". Moments are summed in float64, so that neither many rows nor a large mean cost digits.

Shape suffixes: N rows of this rank, D features, P components.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from clusterssl import dist
from clusterssl.errors import UserError

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 26


@torch.no_grad()
def whiten(x_ND: Tensor, dim: int, device: torch.device | None = None) -> Tensor:
    """Project rows on their first principal components, give each component unit variance and each row unit length.

    Moments and basis are those of the rows of all ranks (one all-reduce of (D + 1)^2 float64 numbers). Components stand
    in order of decreasing variance; the entry of largest magnitude of each principal axis is positive. A component
    without variance would be noise divided by zero and becomes zero. Besides rows and result, memory holds two
    D x D float64 matrices and chunks of rows.

    Args:
        x_ND: floating-point [N, D], this rank's rows; ranks may hold different numbers, on any device.
        dim: P, at most D and less than the number of rows of all ranks.
        device: where to compute and where the result lies; that of the rows when None.

    Returns:
        [N, P], float64 for float64 rows, float32 otherwise.

    Raises:
        UserError: `dim` does not fit, rows are not finite, or all rows are equal.
    """
    device = x_ND.device if device is None else device
    mean_D, axes_DP = _whitening(_second_moments(x_ND, device), dim)
    kind = torch.float64 if x_ND.dtype == torch.float64 else torch.float32
    y_NP = torch.empty(x_ND.shape[0], dim, dtype=kind, device=device)
    start = 0
    for chunk_ND in _chunks(x_ND, device):
        stop = start + chunk_ND.shape[0]
        y_NP[start:stop] = F.normalize((chunk_ND - mean_D) @ axes_DP, dim=1)
        start = stop
    return y_NP


def _chunks(x_ND: Tensor, device: torch.device) -> Iterator[Tensor]:
    """The rows in float64 on a device, some megabytes at a time."""
    for chunk_ND in x_ND.split(max(1, _CHUNK_BYTES // (8 * x_ND.shape[1]))):
        yield chunk_ND.to(device, torch.float64)


def _second_moments(x_ND: Tensor, device: torch.device) -> Tensor:
    """Sum over the rows x of all ranks of the outer product of (x, 1) with itself, float64 [D + 1, D + 1]."""
    dim = x_ND.shape[1]
    moments = torch.zeros(dim + 1, dim + 1, dtype=torch.float64, device=device)
    for chunk_ND in _chunks(x_ND, device):
        moments[:dim, :dim].addmm_(chunk_ND.T, chunk_ND)
        moments[dim, :dim] += chunk_ND.sum(0)
    moments[dim, dim] = x_ND.shape[0]
    return dist.all_reduce_(moments)


def _whitening(moments: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Mean [D] and axes divided by the standard deviation along them [D, P]; the same numbers on all ranks."""
    size, count = moments.shape[0] - 1, int(moments[-1, -1])
    if dim > size or dim >= count:
        raise UserError(
            f"PCA to {dim} dimensions: {count} images with {size} features give at most {min(size, count - 1)}; "
            "lower --pca_dim"
        )
    if not bool(torch.isfinite(moments).all()):
        raise UserError("PCA: some features are not finite; the network has diverged, try a lower learning rate")
    mean_D = moments[size, :size] / count
    second_DD = moments[:size, :size] / count
    floor = float(size * torch.finfo(torch.float64).eps * second_DD.diagonal().sum())  # rounding of the next two lines
    values_D, vectors_DD = torch.linalg.eigh(second_DD.addr_(mean_D, mean_D, alpha=-1))
    values_P, axes_DP = values_D.flip(0)[:dim], vectors_DD.flip(1)[:, :dim]
    flat_P = values_P <= floor
    if bool(flat_P.all()):
        raise UserError("PCA: the features of all images are equal; the network has collapsed")
    if bool(flat_P.any()) and dist.rank() == 0:
        logger.warning("PCA: %d of %d components have no variance and become zero", int(flat_P.sum()), dim)
    largest_1P = axes_DP.abs().argmax(0, keepdim=True)
    scale_P = torch.where(flat_P, 0.0, values_P.clamp_min(floor).rsqrt()) * axes_DP.gather(0, largest_1P)[0].sign()
    return mean_D, dist.broadcast_((axes_DP * scale_P).contiguous())
