"""The nearest centroid of every row, block by block, so that no rows x centroids matrix is held.

Shape suffixes: N rows, n rows of a block, K centroids, D dimension.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clusterssl.cluster.coarse import ELEMENTS, FEWEST, Coarse, Workspace, best_of, candidates, coarse, supported
from clusterssl.errors import UserError
from clusterssl.gpu import for_kernels

Found = Iterator[tuple[slice, Tensor, Tensor]]
"""per block: which rows, the nearest centroid of each (int64 [n]) and its score [n]"""


@dataclass(frozen=True)
class Target:
    """Centroids to search among: the nearest to a row x is the one of highest (x - shift) . c - offset."""

    centroids_KD: Tensor
    shift_D: Tensor | None = None
    """origin that the centroids are relative to; None: zero"""
    offset_K: Tensor | None = None
    """|c|^2 / 2 for Euclidean distances, None for dot products"""

    def near(self, x_nD: Tensor) -> Tensor:
        """Rows relative to the origin."""
        return x_nD if self.shift_D is None else x_nD - self.shift_D

    def scores(self, near_nD: Tensor, labels_n: Tensor) -> Tensor:
        """Of each row, relative to the origin, with one centroid."""
        score_n = torch.linalg.vecdot(near_nD, self.centroids_KD[labels_n])
        return score_n if self.offset_K is None else score_n - self.offset_K[labels_n]

    @functools.cached_property
    def coarse(self) -> Coarse | None:
        """The centroids in bfloat16, where a search profits from it."""
        exact_KD = self.centroids_KD
        fit = exact_KD.device.type == "cpu" and exact_KD.dtype == torch.float32 and len(exact_KD) >= FEWEST
        return coarse(exact_KD, self.offset_K) if fit and supported() else None


Search = Callable[[Tensor, Target], Found]

_SCORES_CPU, _SCORES_GPU = 2**20, 2**27
_FAISS_ROWS = 2**16
_KERNEL_ROWS = 2**18


def block_rows(clusters: int, device: torch.device, dtype: torch.dtype = torch.float32) -> int:
    """Rows of a block: on a CPU its scores shall stay in the cache between being written and being searched."""
    if for_kernels(device, dtype):
        return _KERNEL_ROWS
    scores = _SCORES_GPU if device.type == "cuda" else _SCORES_CPU
    return max(128, min(scores // clusters // 64 * 64, scores // 256))


def search_torch(x_ND: Tensor, target: Target) -> Found:
    """Search by matrix products, on a GPU by one kernel where Triton is; of equal scores the first centroid wins."""
    if for_kernels(x_ND.device, x_ND.dtype):
        yield from search_in_one_kernel(x_ND, target)
        return
    clusters, scores_nK = len(target.centroids_KD), x_ND.new_empty(0)
    rounded = target.coarse if len(x_ND) >= FEWEST else None
    size = max(FEWEST, ELEMENTS // clusters) if rounded else block_rows(clusters, x_ND.device, x_ND.dtype)
    space = Workspace(min(size, len(x_ND)), clusters if rounded else 0)
    for start in range(0, len(x_ND), size):
        rows = slice(start, min(start + size, len(x_ND)))
        near_nD = target.near(x_ND[rows])
        pairs = candidates(near_nD, rounded, space) if rounded else None
        if pairs is not None:
            row_P, centroid_P = pairs
            yield rows, *best_of(*pairs, target.scores(near_nD[row_P], centroid_P), len(near_nD))
            continue
        if not len(scores_nK):
            scores_nK = x_ND.new_empty(min(size, len(x_ND)), clusters)
        out_nK = torch.mm(near_nD, target.centroids_KD.T, out=scores_nK[: rows.stop - start])
        if target.offset_K is not None:
            out_nK -= target.offset_K
        labels_n = first_largest(out_nK)
        yield rows, labels_n, out_nK.gather(1, labels_n[:, None])[:, 0]


def search_in_one_kernel(x_ND: Tensor, target: Target) -> Found:
    """Search without writing a score to memory; see `nearest_kernel`."""
    from clusterssl.cluster.nearest_kernel import nearest_by_kernel

    for start in range(0, len(x_ND), _KERNEL_ROWS):
        rows = slice(start, min(start + _KERNEL_ROWS, len(x_ND)))
        near_nD = target.near(x_ND[rows])
        labels_n = nearest_by_kernel(near_nD, target.centroids_KD, target.offset_K)
        yield rows, labels_n, target.scores(near_nD, labels_n)


def first_largest(scores_nK: Tensor) -> Tensor:
    """First largest column of each row; numpy's search for it on CPUs is several times faster than torch's."""
    if scores_nK.device.type == "cpu":
        return torch.from_numpy(scores_nK.numpy().argmax(1))
    return scores_nK.argmax(1)


def search_faiss(x_ND: Tensor, target: Target) -> Found:
    """Search by a flat index of faiss, on the rows' GPU where faiss has GPU support; the order of ties is faiss's."""
    faiss = import_faiss()
    euclidean = target.offset_K is not None
    index = (faiss.IndexFlatL2 if euclidean else faiss.IndexFlatIP)(target.centroids_KD.shape[1])
    if x_ND.is_cuda and getattr(faiss, "get_num_gpus", int)() > 0:
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), x_ND.device.index, index)
    index.add(target.centroids_KD.float().cpu().numpy())
    for start in range(0, len(x_ND), _FAISS_ROWS):
        rows = slice(start, min(start + _FAISS_ROWS, len(x_ND)))
        x_nD = target.near(x_ND[rows])
        found, labels = index.search(x_nD.float().cpu().numpy(), 1)
        score_n = torch.from_numpy(found[:, 0]).to(x_ND)
        if euclidean:  # what was found is |x - c|^2
            score_n = (x_nD.square().sum(1) - score_n) / 2
        yield rows, torch.from_numpy(labels[:, 0]).to(x_ND.device), score_n


def import_faiss() -> Any:
    """The faiss module.

    Raises:
        UserError: it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise UserError(
            f"--kmeans_backend faiss: faiss cannot be imported ({error}); pip install faiss-cpu, or use torch"
        ) from error
    return faiss


SEARCHES: dict[str, Search] = {"torch": search_torch, "faiss": search_faiss}
