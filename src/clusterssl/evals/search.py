"""Exact search of nearest neighbours by cosine similarity.

Legend of suffixes: N bank rows, of a block or all; Q query images, F features, k neighbours.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clusterssl.errors import UserError

CHUNK, BANK_CHUNK = 1024, 16384
_FAISS_BYTES = 2**29  # of a block that faiss searches: it begins each one without a bound
_FAISS_ROWS = 2**14  # fewer are searched before it is imported


def nearest(
    bank_NF: Tensor, queries: Sequence[Tensor], k: int, *, bank_chunk: int = BANK_CHUNK,
    device: torch.device | str = "cpu",
) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
    """Exact search by cosine similarity.

    Args:
        bank_NF: rows to search in, any scale.
        queries: chunks Q x F, searched for one after the other.
        k: number of neighbours, at most N.
        bank_chunk: bank rows at a time; the bank is the outer loop, so that each block travels to the device once.
        device: where to compute; float32 features on a CPU are searched by faiss where it is installed.

    Returns:
        For each chunk similarities [Q, k], highest first, and rows of the bank, int64 [Q, k]; equal ones by row, though
        which of equal ones at the k-th place are there is open.

    Raises:
        UserError: features are not finite.
    """
    if not queries:
        return []
    unit = [_unit(part_QF.to(device)) for part_QF in queries]
    best = [_Best(len(part_QF), k, part_QF) for part_QF in unit]
    if searched_by_faiss(len(bank_NF), unit[0]):
        _search_by_faiss(bank_NF, unit, best)
        return [found.in_order() for found in best]
    room = _Room(max(map(len, unit)) * min(bank_chunk, len(bank_NF)), unit[0])
    for start, stop in _blocks(len(bank_NF), k, bank_chunk):
        block_NF = _unit(bank_NF[start:stop].to(device))
        for part_QF, found in zip(unit, best, strict=True):
            found.see(room.product(part_QF, block_NF), start, room)
    return [found.in_order() for found in best]


def _unit(rows_NF: Tensor) -> Tensor:
    """Rows of unit length."""
    rows_NF = F.normalize(rows_NF, dim=1)
    if not bool(rows_NF.sum().isfinite()):
        raise UserError("features are not finite: the network's activations overflow; take an earlier checkpoint")
    return rows_NF


def searched_by_faiss(rows: int, like: Tensor) -> bool:
    """Whether a bank of that size is searched by faiss; never depends on the queries, which ranks share out."""
    fits = like.device.type == "cpu" and like.dtype == torch.float32 and rows >= _FAISS_ROWS
    return fits and importlib.util.find_spec("faiss") is not None


def _faiss_rows(feature_dim: int) -> int:
    return max(1, _FAISS_BYTES // (4 * feature_dim))


def _search_by_faiss(bank_NF: Tensor, unit: Sequence[Tensor], best: Sequence[_Best]) -> None:
    """Let faiss compare all pairs (Johnson et al. 2017, https://arxiv.org/abs/1702.08734), chunk by chunk."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    rows, k = _faiss_rows(bank_NF.shape[1]), best[0].k
    for start in range(0, len(bank_NF), rows):
        block_NF = _unit(bank_NF[start : start + rows]).numpy()
        for part_QF, found in zip(unit, best, strict=True):
            similarity, row = faiss.knn(
                part_QF.numpy(), block_NF, min(k, len(block_NF)), metric=faiss.METRIC_INNER_PRODUCT
            )  # fmt: skip
            found.merge(torch.from_numpy(similarity), torch.from_numpy(row) + start)


def _blocks(rows: int, k: int, most: int) -> Iterator[tuple[int, int]]:
    """First and last row of each block: the first ones are small, since all of their similarities are sorted."""
    start, width = 0, min(20 * k, most)
    while start < rows:
        yield start, min(start + width, rows)
        start, width = start + width, min(2 * width, most)


class _Room:
    """Memory used again for every block: fresh pages would cost as much time as the comparison of its numbers.

    On a CPU numpy does the work: its BLAS and its scans of a mask are faster than torch's.
    """

    def __init__(self, numbers: int, like: Tensor) -> None:
        self.on_cpu = like.device.type == "cpu"
        self._similarity = like.new_empty(numbers)
        self._passing = like.new_empty(numbers, dtype=torch.bool)

    def product(self, part_QF: Tensor, block_NF: Tensor) -> Tensor:
        """Dot products of all pairs of rows [Q, N]."""
        out_QN = self._similarity[: len(part_QF) * len(block_NF)].view(len(part_QF), len(block_NF))
        if self.on_cpu:
            np.matmul(part_QF.numpy(), block_NF.numpy().T, out=out_QN.numpy())
        else:
            torch.mm(part_QF, block_NF.T, out=out_QN)
        return out_QN

    def passing(self, similarity_QN: Tensor, least_Q1: Tensor) -> Tensor:
        """Positions, in the flattened matrix, of what lies above a bound of its row."""
        out_QN = self._passing[: similarity_QN.numel()].view(similarity_QN.shape)
        if self.on_cpu:
            np.greater(similarity_QN.numpy(), least_Q1.numpy(), out=out_QN.numpy())
            return torch.from_numpy(np.flatnonzero(out_QN.numpy()))
        torch.gt(similarity_QN, least_Q1, out=out_QN)
        return out_QN.flatten().nonzero()[:, 0]


_MOST_PASSING = 1 / 16


class _Best:
    """The most similar bank rows of some queries, found block by block."""

    def __init__(self, queries: int, k: int, like: Tensor) -> None:
        self.k = k
        self.similarity_Qk = like.new_empty(queries, 0)
        self.row_Qk = torch.empty(queries, 0, dtype=torch.int64, device=like.device)

    def see(self, similarity_QN: Tensor, first: int, room: _Room) -> None:
        """Take in the similarities to the bank rows from `first` on."""
        if self.similarity_Qk.shape[1] == self.k:
            at = room.passing(similarity_QN, self.similarity_Qk.amin(1, keepdim=True))
            if len(at) <= _MOST_PASSING * similarity_QN.numel():
                if len(at):
                    self.merge(*_gathered(similarity_QN, at, first))
                return
        similarity, column = similarity_QN.topk(min(self.k, similarity_QN.shape[1]), dim=1, sorted=False)
        self.merge(similarity, column + first)

    def merge(self, similarity: Tensor, row: Tensor) -> None:
        """Take in some bank rows and their similarities for each query."""
        similarity = torch.cat([self.similarity_Qk, similarity], dim=1)
        self.similarity_Qk, place = similarity.topk(min(self.k, similarity.shape[1]), dim=1, sorted=False)
        self.row_Qk = torch.cat([self.row_Qk, row], dim=1).gather(1, place)

    def in_order(self) -> tuple[Tensor, Tensor]:
        """Similarities and rows, the highest first, equal ones by row."""
        row_Qk, order = self.row_Qk.sort(dim=1)
        similarity_Qk, place = self.similarity_Qk.gather(1, order).sort(dim=1, descending=True, stable=True)
        return similarity_Qk, row_Qk.gather(1, place)


def _gathered(similarity_QN: Tensor, at: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """The entries at some positions, moved to the left of their rows, -inf elsewhere; and their bank rows."""
    query = at.div(similarity_QN.shape[1], rounding_mode="floor")
    count_Q = torch.bincount(query, minlength=len(similarity_QN))
    place = torch.arange(len(at), device=at.device) - (count_Q.cumsum(0) - count_Q)[query]
    similarity = similarity_QN.new_full((len(similarity_QN), int(count_Q.max())), -math.inf)
    row = torch.zeros(similarity.shape, dtype=torch.int64, device=at.device)
    similarity[query, place] = similarity_QN.flatten()[at]
    row[query, place] = at - query * similarity_QN.shape[1] + first
    return similarity, row


def memory_mib(
    num_train: int, num_queries: int, largest_k: int, *, feature_dim: int, bytes_per_number: int = 4,
    chunk: int = CHUNK, bank_chunk: int = BANK_CHUNK,
) -> float:  # fmt: skip
    """About how many MiB a search holds at most on its device beside the features handed to it.

    Counted: the queries at unit length; one block of training features as given and at unit length, larger where faiss
    searches it; one block of similarities, its comparison with the neighbours found so far and what passes it; the
    neighbours (similarity and row) of all queries.
    """
    chunk, block = min(chunk, num_queries), min(max(bank_chunk, _faiss_rows(feature_dim)), num_train)
    features = (num_queries + 2 * block) * feature_dim * bytes_per_number
    similarities = chunk * min(bank_chunk, block) * (bytes_per_number + 1 + _MOST_PASSING * (16 + bytes_per_number))
    neighbours = (num_queries + 2 * chunk) * largest_k * (bytes_per_number + 8)
    return (features + similarities + neighbours) / 2**20
