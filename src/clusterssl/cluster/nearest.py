"""The nearest centroid of every row, block by block, so that no rows x centroids matrix is held.

Shape suffixes: N rows, n rows of a block, K centroids, D dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from clusterssl.errors import UserError

Found = Iterator[tuple[slice, Tensor, Tensor]]
"""per block: which rows, the nearest centroid of each (int64 [n]) and its score [n]"""

Search = Callable[[Tensor, Tensor, Tensor | None], Found]
"""from rows [N, D], centroids [K, D] and an offset [K] (None: zero) to the centroids of highest x . c - offset"""

_SCORES_CPU, _SCORES_GPU = 2**20, 2**27
_FAISS_ROWS = 2**16


def block_rows(clusters: int, device: torch.device) -> int:
    """Rows of a block: on a CPU its scores shall stay in the cache between being written and being searched."""
    scores = _SCORES_GPU if device.type == "cuda" else _SCORES_CPU
    return max(128, min(scores // clusters // 64 * 64, scores // 256))


def search_torch(x_ND: Tensor, centroids_KD: Tensor, offset_K: Tensor | None) -> Found:
    """Search by matrix products; of equal scores the first centroid wins."""
    size = block_rows(len(centroids_KD), x_ND.device)
    scores_nK = x_ND.new_empty(min(size, len(x_ND)), len(centroids_KD))
    for start in range(0, len(x_ND), size):
        rows = slice(start, min(start + size, len(x_ND)))
        out_nK = torch.mm(x_ND[rows], centroids_KD.T, out=scores_nK[: rows.stop - start])
        if offset_K is not None:
            out_nK -= offset_K
        labels_n = _argmax(out_nK)
        yield rows, labels_n, out_nK.gather(1, labels_n[:, None])[:, 0]


def _argmax(scores_nK: Tensor) -> Tensor:
    """First largest column of each row; numpy's search for it on CPUs is several times faster than torch's."""
    if scores_nK.device.type == "cpu":
        return torch.from_numpy(scores_nK.numpy().argmax(1))
    return scores_nK.argmax(1)


def search_faiss(x_ND: Tensor, centroids_KD: Tensor, offset_K: Tensor | None) -> Found:
    """Search by a flat index of faiss, on the rows' GPU where faiss has GPU support; the order of ties is faiss's."""
    faiss = import_faiss()
    dim = centroids_KD.shape[1]
    index = faiss.IndexFlatIP(dim) if offset_K is None else faiss.IndexFlatL2(dim)
    if x_ND.is_cuda and getattr(faiss, "get_num_gpus", int)() > 0:
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), x_ND.device.index, index)
    index.add(centroids_KD.float().cpu().numpy())
    for start in range(0, len(x_ND), _FAISS_ROWS):
        rows = slice(start, min(start + _FAISS_ROWS, len(x_ND)))
        found, labels = index.search(x_ND[rows].float().cpu().numpy(), 1)
        score_n = torch.from_numpy(found[:, 0]).to(x_ND)
        if offset_K is not None:  # offset is |c|^2 / 2, found is |x - c|^2
            score_n = (x_ND[rows].square().sum(1) - score_n) / 2
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
