"""Steps of Lloyd's algorithm: the nearest centroid of every row, and the sums of the clusters.

A step profits from the one before, without bounds to keep for each row (as Elkan 2003 and Hamerly 2010 do) and without
a change of the result. A centroid that did not move scores what it scored before. So a row needs to be compared with
those that moved only, and with all of them only where its own one moved away from it; and only clusters that won or
lost a row need new sums. As clusters settle, a step costs less and less.

Shape suffixes: N rows of this rank, n rows of a block, K clusters, M of them moved, D dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from clusterssl import dist
from clusterssl.cluster.cores import on_cores
from clusterssl.cluster.nearest import SEARCHES, Target, block_rows

BLOCK = 2**13
"""rows that are selected from at once on a CPU"""
_SMALL = 2**20
_MOST_MOVED = 0.75
_NEAR = 1e-5


class Found(NamedTuple):
    """What a step found; all but labels and scores over all ranks."""

    labels_N: Tensor
    """nearest centroid of this rank's rows, int64"""
    scores_N: Tensor
    """and its score, see `nearest.Target`"""
    sums_KD: Tensor
    """float64; of the step before, where nobody learns"""
    counts_K: Tensor
    """int64"""
    score_sum: float


class Lloyd:
    """The rows of all ranks, and what the last step found."""

    def __init__(self, x_ND: Tensor, target: Callable[[Tensor], Target], backend: Literal["torch", "faiss"]) -> None:
        """Begin.

        Args:
            x_ND: rows of this rank.
            target: from centroids [K, D], or some of them, to what the rows are compared with.
            backend: of the search.
        """
        self.x_ND, self.target, self.search, self.backend = x_ND, target, SEARCHES[backend], backend
        self.labels_N = torch.empty(len(x_ND), dtype=torch.int64, device=x_ND.device)
        self.scores_N = x_ND.new_empty(len(x_ND))
        self.centroids_KD: Tensor | None = None
        self.sums_KD = x_ND.new_empty(0, dtype=torch.float64)

    def step(self, centroids_KD: Tensor, *, learn: bool) -> Found:
        """The nearest centroid of every row, of equal ones the first; a collective call.

        Args:
            centroids_KD: the same number at every step.
            learn: whether the sums are needed.
        """
        clusters = len(centroids_KD)
        changed_K = self._assign(centroids_KD)
        counts_K = torch.bincount(self.labels_N, minlength=clusters)
        if learn:
            self._add_up(changed_K)
        part = BLOCK if self.scores_N.device.type == "cpu" else 2**24
        score_sum = sum(scores_n.double().sum() for scores_n in self.scores_N.split(part))
        facts = torch.cat([counts_K.double(), counts_K.new_full((1,), 0).double() + score_sum])
        packed = dist.all_reduce_(torch.cat([facts, self.sums_KD.flatten()]) if learn else facts)
        sums_KD = packed[clusters + 1 :].view_as(self.sums_KD) if learn else self.sums_KD
        return Found(self.labels_N, self.scores_N, sums_KD, packed[:clusters].long(), float(packed[clusters]))

    def _assign(self, centroids_KD: Tensor) -> Tensor:
        """Search for all rows; which clusters won or lost one of this rank's, bool [K]."""
        before, self.centroids_KD = self.centroids_KD, centroids_KD
        moved_K = centroids_KD.new_ones(len(centroids_KD), dtype=torch.bool)
        if before is not None:
            moved_K = (centroids_KD != before).any(1)
        change = _Change(self.target, centroids_KD, moved_K)
        anew = before is None or float(moved_K.float().mean()) > _MOST_MOVED

        def of_share(start: int, stop: int) -> Tensor:
            changes_K = torch.zeros_like(moved_K, dtype=torch.int32)
            with torch.no_grad(), torch.autocast(self.x_ND.device.type, enabled=False):
                for rows in self._blocks(start, stop):
                    labels_n, scores_n = self._full(rows, change) if anew else self._partial(rows, change)
                    if before is not None:
                        other_n = (labels_n != self.labels_N[rows]).int()
                        changes_K.index_add_(0, labels_n, other_n).index_add_(0, self.labels_N[rows], other_n)
                    self.labels_N[rows], self.scores_N[rows] = labels_n, scores_n
            return changes_K

        changes_K = torch.stack(self._on_cores(of_share)).sum(0)
        return changes_K > 0 if before is not None else torch.ones_like(moved_K)

    def _blocks(self, start: int, stop: int) -> Iterator[slice]:
        """Rows of a share in parts; large ones on a GPU, which waits for the host at each."""
        on_cpu = self.x_ND.device.type == "cpu"
        assert self.centroids_KD is not None
        size = BLOCK if on_cpu else block_rows(len(self.centroids_KD), self.x_ND.device, self.x_ND.dtype)
        return (slice(first, min(first + size, stop)) for first in range(start, stop, size))

    def _on_cores(self, of_share: Callable[[int, int], Tensor]) -> list[Tensor]:
        assert self.centroids_KD is not None
        large = len(self.x_ND) * len(self.centroids_KD) > _SMALL
        several = self.backend == "torch" and self.x_ND.device.type == "cpu" and large
        return on_cores(of_share, len(self.x_ND)) if several else [of_share(0, len(self.x_ND))]

    def _full(self, rows: slice, change: _Change) -> tuple[Tensor, Tensor]:
        return _nearest(self.search, self.x_ND[rows], change.all)

    def _partial(self, rows: slice, change: _Change) -> tuple[Tensor, Tensor]:
        x_nD, labels_n, scores_n = self.x_ND[rows], self.labels_N[rows].clone(), self.scores_N[rows].clone()
        lost_n = torch.zeros_like(labels_n, dtype=torch.bool)
        own = change.moved_K[labels_n].nonzero()[:, 0]
        now = change.all.scores(change.all.near(x_nD[own]), labels_n[own])
        lost_n[own] = now < scores_n[own]
        scores_n[own] = now
        kept = (~lost_n).nonzero()[:, 0]
        if len(change.index_M) and len(kept):
            found, best = _nearest(self.search, x_nD[kept], change.some)
            found = change.index_M[found]
            near = (found != labels_n[kept]) & (best >= scores_n[kept] - _NEAR * (1 + best.abs()))
            rows_P, found_P = kept[near], found[near]
            labels_n[rows_P], scores_n[rows_P] = change.better(x_nD[rows_P], labels_n[rows_P], found_P)
        lost = lost_n.nonzero()[:, 0]
        if len(lost):
            labels_n[lost], scores_n[lost] = _nearest(self.search, x_nD[lost], change.all)
        return labels_n, scores_n

    def _add_up(self, changed_K: Tensor) -> None:
        """New sums of the changed clusters; rows of a share in their order, so that other clusters' change no bit."""
        clusters, dim = len(changed_K), self.x_ND.shape[1]

        def of_share(start: int, stop: int) -> Tensor:
            sums_KD = torch.zeros(clusters, dim, dtype=torch.float64, device=self.x_ND.device)
            for rows in self._blocks(start, stop):
                some = changed_K[self.labels_N[rows]].nonzero()[:, 0]
                sums_KD.index_add_(0, self.labels_N[rows][some], self.x_ND[rows][some].double())
            return sums_KD

        sums_KD = torch.stack(self._on_cores(of_share)).sum(0)
        if len(self.sums_KD):
            sums_KD = torch.where(changed_K[:, None], sums_KD, self.sums_KD)
        self.sums_KD = sums_KD


class _Change:
    """Centroids of a step, and which of them moved."""

    def __init__(self, target: Callable[[Tensor], Target], centroids_KD: Tensor, moved_K: Tensor) -> None:
        self.moved_K, self.index_M = moved_K, moved_K.nonzero()[:, 0]
        self.all, self.some = target(centroids_KD), target(centroids_KD[self.index_M])

    def better(self, x_PD: Tensor, own_P: Tensor, rival_P: Tensor) -> tuple[Tensor, Tensor]:
        """The nearer of two centroids of each row, of equal ones the first, and its score; both by the same sums."""
        near_PD = self.all.near(x_PD)
        own, rival = self.all.scores(near_PD, own_P), self.all.scores(near_PD, rival_P)
        wins = (rival > own) | ((rival == own) & (rival_P < own_P))
        return torch.where(wins, rival_P, own_P), torch.where(wins, rival, own)


def _nearest(search: Callable, x_nD: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    labels_n, scores_n = zip(*((labels, scores) for _, labels, scores in search(x_nD, target)), strict=True)
    return torch.cat(labels_n), torch.cat(scores_n)
