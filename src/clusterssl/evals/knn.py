"""Weighted k-nearest-neighbour classification of frozen features.

Legend of suffixes: N training images, Q query images, F features, C classes, k neighbours.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clusterssl import dist

logger = logging.getLogger(__name__)

CHUNK, BANK_CHUNK = 1024, 16384


def knn_accuracy(
    train_NF: Tensor,
    train_labels_N: Tensor,
    test_QF: Tensor,
    test_labels_Q: Tensor,
    *,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.1,
    chunk: int = CHUNK,
    bank_chunk: int = BANK_CHUNK,
    device: torch.device | str | None = None,
) -> dict[int, tuple[float, float]]:
    """Top-1 and top-5 accuracy of weighted nearest neighbours (Wu et al. 2018, section 3.4).

    Each of the k most similar training images (cosine) votes for its class with weight exp(similarity / temperature).
    Classes without a vote follow in the order of their numbers, as in the published evaluations, so that top-5 with
    fewer than five voted classes is flattered. Similarities are computed in the features' own precision, votes are
    summed in float64. The training features may be memory-mapped: they are read block by block, once, and never more
    than chunk x bank_chunk similarities exist at a time; see `memory_mib`.

    A collective: every rank passes the same tensors; chunks of queries are shared out, and since the chunks do not
    depend on the number of ranks, neither does the result.

    Args:
        train_NF: training features, any scale (rows are normalised), float32 or float64.
        train_labels_N: classes 0 .. C - 1, int64.
        test_QF: query features.
        test_labels_Q: their classes.
        ks: numbers of neighbours; those above N are lowered to N.
        temperature: tau of the weights.
        chunk: queries at a time.
        bank_chunk: training images at a time.
        device: where to compute; that of `train_NF` when None.

    Returns:
        {k: (top-1, top-5)} in percent, k ascending.
    """
    sizes = _fitting(ks, len(train_NF))
    device = train_NF.device if device is None else torch.device(device)
    num_classes = int(max(train_labels_N.max(), test_labels_Q.max())) + 1
    starts = range(0, len(test_QF), chunk)
    first, last = dist.share(len(starts))
    mine = [slice(start, start + chunk) for start in starts[first:last]]
    found = nearest(train_NF, [test_QF[part] for part in mine], sizes[-1], bank_chunk=bank_chunk, device=device)
    train_labels_N = train_labels_N.to(device)
    correct = torch.zeros(len(sizes), 2, dtype=torch.int64)
    for part, (similarity_Qk, row_Qk) in zip(mine, found, strict=True):
        targets_Q, label_Qk = test_labels_Q[part].to(device), train_labels_N[row_Qk]
        for i, k in enumerate(sizes):
            scores_QC = _votes(similarity_Qk[:, :k], label_Qk[:, :k], num_classes, temperature)
            correct[i] += _hits(scores_QC, targets_Q)
    percent = 100.0 * dist.all_reduce_(correct).double() / len(test_QF)
    return {k: (float(top1), float(top5)) for k, (top1, top5) in zip(sizes, percent.tolist(), strict=True)}


def memory_mib(
    num_train: int, num_queries: int, largest_k: int, *, feature_dim: int, bytes_per_number: int = 4,
    chunk: int = CHUNK, bank_chunk: int = BANK_CHUNK,
) -> float:  # fmt: skip
    """About how many MiB `knn_accuracy` holds at most on its device beside the features handed to it.

    Counted: the queries at unit length; one block of training features as given and at unit length; one block of
    similarities, its comparison with the neighbours found so far and what passes it; the neighbours (similarity and
    row) of all queries.
    """
    chunk, block = min(chunk, num_queries), min(bank_chunk, num_train)
    features = (num_queries + 2 * block) * feature_dim * bytes_per_number
    similarities = chunk * block * (bytes_per_number + 1 + _MOST_PASSING * (16 + bytes_per_number))
    neighbours = (num_queries + 2 * chunk) * largest_k * (bytes_per_number + 8)
    return (features + similarities + neighbours) / 2**20


def _fitting(ks: Sequence[int], size: int) -> list[int]:
    lowered = [k for k in ks if k > size]
    if lowered and dist.rank() == 0:
        logger.warning("k-NN: k = %s lowered to %d, the number of training images", lowered, size)
    return sorted({min(k, size) for k in ks})


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
        device: where to compute.

    Returns:
        For each chunk similarities [Q, k], highest first, and rows of the bank, int64 [Q, k].
    """
    unit = [F.normalize(part_QF.to(device), dim=1) for part_QF in queries]
    if not unit:
        return []
    best = [_Best(len(part_QF), k, part_QF) for part_QF in unit]
    room = _Room(max(map(len, unit)) * min(bank_chunk, len(bank_NF)), unit[0])
    for start, stop in _blocks(len(bank_NF), k, bank_chunk):
        block_NF = F.normalize(bank_NF[start:stop].to(device), dim=1)
        for part_QF, found in zip(unit, best, strict=True):
            found.see(room.product(part_QF, block_NF), start, room)
    return [found.in_order() for found in best]


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
                    self._merge(*_gathered(similarity_QN, at, first))
                return
        similarity, column = similarity_QN.topk(min(self.k, similarity_QN.shape[1]), dim=1, sorted=False)
        self._merge(similarity, column + first)

    def _merge(self, similarity: Tensor, row: Tensor) -> None:
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


def _votes(similarity_Qk: Tensor, label_Qk: Tensor, num_classes: int, temperature: float) -> Tensor:
    """Sum of weights per class, Q x C float64; weights are relative to the nearest neighbour's and cannot overflow."""
    similarity_Qk = similarity_Qk.double()
    weight_Qk = ((similarity_Qk - similarity_Qk[:, :1]) / temperature).exp()
    scores_QC = weight_Qk.new_zeros(len(weight_Qk), num_classes)
    return scores_QC.scatter_add_(1, label_Qk, weight_Qk)


def _hits(scores_QC: Tensor, targets_Q: Tensor) -> Tensor:
    """Numbers of queries whose class is first, and among the first five, int64 [2] on the CPU."""
    ranked = scores_QC.argsort(dim=1, descending=True, stable=True)[:, :5] == targets_Q[:, None]
    return torch.stack([ranked[:, 0].sum(), ranked.sum()]).cpu()


def check_flags(ks: Sequence[int], temperature: float) -> str:
    """What is wrong with the flags of the evaluation, or ""."""
    if not ks or min(ks) < 1:
        return f"--nb_knn {' '.join(map(str, ks))}: numbers of neighbours start at 1"
    if not (temperature > 0 and math.isfinite(temperature)):
        return f"--temperature {temperature}: must be above 0"
    return ""
