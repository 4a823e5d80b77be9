"""k-means over the rows of all ranks: spherical (DeepCluster-v2) and Euclidean (DeepCluster).

One iteration is a search for the nearest centroid of every row, block by block; sums and counts of the clusters in
float64; and one all-reduce of K x (D + 1) numbers (`cluster.lloyd`). No N x K matrix is held, and any number of ranks
gives what one rank gives.

A centroid that no row is nearest to is *empty*. With `kmeans_empty="split"`, the default, no cluster ends empty (the
rule is in `cluster.empty`): an empty cluster would be a prototype that no image is ever trained towards. With "keep" an
empty centroid stays where it is, as in the published DeepCluster-v2. Where no cluster empties, both are the same.

Shape suffixes: N rows of this rank, n rows of a block, K clusters, D dimension.
"""

from __future__ import annotations

import functools
import logging
import time
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clusterssl import dist, pulse
from clusterssl.cluster.coarse import ELEMENTS, FEWEST
from clusterssl.cluster.cores import MOST
from clusterssl.cluster.empty import fill_empty, split_largest
from clusterssl.cluster.lloyd import BLOCK, Found, Lloyd
from clusterssl.cluster.nearest import Target, block_rows, import_faiss
from clusterssl.cluster.rows import GlobalRows
from clusterssl.cluster.seeding import SAMPLE, plus_plus, random_rows
from clusterssl.config import require_numbers
from clusterssl.errors import UserError
from clusterssl.gpu import for_kernels

logger = logging.getLogger(__name__)

_ROWS = 2**14
_SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class KMeansOptions:
    """k-means."""

    kmeans_iters: int = 10
    """iterations of each k-means"""
    kmeans_init: Literal["random", "kmeans++"] = "random"
    """first centroids: random images, or k-means++ on a sample of 16 images per cluster"""
    kmeans_empty: Literal["split", "keep"] = "split"
    """what a centroid without images does: take half of the largest cluster, or stay (as published)"""
    kmeans_backend: Literal["torch", "faiss"] = "torch"
    """what searches the nearest centroids"""

    def __post_init__(self) -> None:
        require_numbers(self, "kmeans_iters", least=1)
        if self.kmeans_backend == "faiss":
            import_faiss()


class Clusters(NamedTuple):
    """What k-means found."""

    labels_N: Tensor
    """of this rank's rows, int64"""
    centroids_KD: Tensor
    """the same on every rank, in the type of the rows"""
    counts_K: Tensor
    """rows of each cluster over all ranks, int64"""
    inertia: list[float]
    """sum of the squared distances of all rows to their centroids at each iteration's search, and at the last one"""


def spherical_kmeans(
    x_ND: Tensor,
    clusters: int | Tensor,
    options: KMeansOptions | None = None,
    *,
    seed: int = 0,
    draw: int = 0,
    ids_N: Tensor | None = None,
) -> Clusters:
    """k-means with unit centroids and dot products (Dhillon and Modha 2001); a collective call.

    That of DeepCluster-v2 (Caron et al. 2020, appendix D): each row goes to the centroid with the largest dot product,
    the first of equal ones; each centroid becomes the mean of its rows scaled to unit length.

    Args:
        x_ND: unit rows of this rank, float32 or float64; ranks may hold different numbers.
        clusters: K, or the first centroids [K, D].
        options: iterations, start, empty clusters, backend.
        seed: of the run.
        draw: number of this clustering; with another one the start differs.
        ids_N: numbers of the rows among those of all ranks, on which the draws depend; None: in rank order.

    Raises:
        UserError: fewer than K rows, or rows that are not finite or not of unit length.
    """
    return _kmeans(_Problem(GlobalRows(x_ND, ids_N), True), clusters, options or KMeansOptions(), seed, draw)


def euclidean_kmeans(
    x_ND: Tensor,
    clusters: int | Tensor,
    options: KMeansOptions | None = None,
    *,
    seed: int = 0,
    draw: int = 0,
    ids_N: Tensor | None = None,
) -> Clusters:
    """k-means with squared Euclidean distances (Lloyd 1982); a collective call.

    Arguments, result and errors as `spherical_kmeans`, but rows of any length and by default 20 iterations, as in
    DeepCluster (Caron et al. 2018, arXiv 1807.05520).
    """
    options = options or KMeansOptions(kmeans_iters=20)
    return _kmeans(_Problem(GlobalRows(x_ND, ids_N), False), clusters, options, seed, draw)


def memory_estimate(
    rows: int, dim: int, clusters: int, device: torch.device, init: str = "random", number_bytes: int = 4
) -> int:
    """Bytes that k-means takes on one rank at its peak, beside the rows of that rank.

    For each core scores of a block in float32 and bfloat16, copies of the rows selected from at once, float64 sums, and
    8 MB of workspace of the matrix product; sums, their update and the centroids of two steps; of each row number,
    order, label, score, length, and what drawing its random number takes; with k-means++ its sample.
    """
    block = min(block_rows(clusters, device), rows)
    cores = min(torch.get_num_threads(), MOST) if device.type == "cpu" else 1
    rounded = 3 * max(ELEMENTS, FEWEST * clusters) if device.type == "cpu" else 0
    selected = min(BLOCK if device.type == "cpu" else block, rows) * dim * (4 * number_bytes + 8)
    scores = 0 if for_kernels(device, torch.float32) else block * clusters * number_bytes
    of_core = scores + rounded + selected + clusters * dim * 16 + 2**23
    centroids = (clusters + 1) * (dim + 1) * (32 + 6 * number_bytes)
    sample = SAMPLE * clusters * dim * number_bytes if init == "kmeans++" else 0
    return cores * of_core + centroids + sample + rows * (2 * 8 + 2 * (8 + number_bytes) + number_bytes + 10 * 8)


class _Problem:
    """The rows, and what tells the two kinds of k-means apart."""

    def __init__(self, rows: GlobalRows, spherical: bool) -> None:
        rows.check(unit=spherical)
        self.rows, self.spherical = rows, spherical
        self.shift_D = None if spherical else self._mean()  # products are more exact near the origin
        target = self.target(rows.x_ND[:0])
        # in blocks: a squared copy of everything would double the rows
        self.square_N = torch.cat([target.near(part).square().sum(1) for part in rows.x_ND.split(_ROWS)])
        self.square_sum = float(dist.all_reduce_(self.square_N.double().sum()))

    def _mean(self) -> Tensor:
        sums = torch.stack([part.double().sum(0) for part in self.rows.x_ND.split(_ROWS)])
        return (dist.all_reduce_(sums.sum(0)) / self.rows.total).to(self.rows.x_ND)

    def target(self, centroids_KD: Tensor) -> Target:
        """What the rows are compared with."""
        if self.shift_D is None:
            return Target(centroids_KD)
        near_KD = centroids_KD - self.shift_D
        return Target(near_KD, self.shift_D, near_KD.square().sum(1) / 2)

    def distances(self, scores_N: Tensor) -> Tensor:
        """Squared distances of this rank's rows to the centroids that scored so."""
        return self.square_N - 2 * scores_N + float(self.spherical)

    def inertia(self, score_sum: float) -> float:
        """Sum of the squared distances of all rows, from the sum of their scores."""
        return self.square_sum - 2 * score_sum + float(self.spherical) * self.rows.total


@torch.no_grad()
def _kmeans(problem: _Problem, clusters: int | Tensor, options: KMeansOptions, seed: int, draw: int) -> Clusters:
    rows, number = problem.rows, clusters if isinstance(clusters, int) else len(clusters)
    if number > rows.total:
        raise UserError(f"k-means: {number} clusters of {rows.total} images; ask for at most {rows.total}")
    _tell(rows, number, options)
    if isinstance(clusters, Tensor):
        centroids_KD = clusters.to(rows.x_ND)
    else:
        start = plus_plus if options.kmeans_init == "kmeans++" else random_rows
        centroids_KD = start(rows, number, seed, draw)
    lloyd = Lloyd(rows.x_ND, problem.target, options.kmeans_backend)
    inertia, began = [], time.monotonic()
    for _ in range(options.kmeans_iters):
        pulse.tick()
        found = lloyd.step(centroids_KD, learn=True)
        centroids_KD = _updated(problem, found, centroids_KD, options)
        inertia.append(problem.inertia(found.score_sum))
        began = _progress(began, inertia, options)
    found = lloyd.step(centroids_KD, learn=False)
    inertia.append(problem.inertia(found.score_sum))
    counts_K = found.counts_K
    if options.kmeans_empty == "split":
        distances_N = problem.distances(found.scores_N)
        centroids_KD, counts_K = fill_empty(rows, found.labels_N, distances_N, counts_K, centroids_KD)
    return Clusters(found.labels_N, centroids_KD, counts_K, inertia)


def _updated(problem: _Problem, found: Found, centroids_KD: Tensor, options: KMeansOptions) -> Tensor:
    """Means of the clusters, as new centroids."""
    means_KD = found.sums_KD / found.counts_K.clamp(min=1)[:, None]
    new_KD = torch.where(found.counts_K[:, None] > 0, means_KD.to(centroids_KD), centroids_KD)
    if options.kmeans_empty == "split":
        new_KD = split_largest(new_KD, found.counts_K)
    return F.normalize(new_KD, dim=1) if problem.spherical else new_KD


def _tell(rows: GlobalRows, clusters: int, options: KMeansOptions) -> None:
    (mine, dim), x_ND = rows.x_ND.shape, rows.x_ND
    needed = memory_estimate(mine, dim, clusters, x_ND.device, options.kmeans_init, x_ND.element_size())
    _tell_once(rows.total, dim, clusters, needed)


@functools.cache
def _tell_once(total: int, dim: int, clusters: int, needed: int) -> None:
    """Once for each problem: most are solved anew at every epoch."""
    if dist.rank() == 0:
        logger.info("k-means of %d x %d features into %d clusters: needs %.0f MB on each rank beside its features",
                    total, dim, clusters, needed / 2**20)  # fmt: skip


def _progress(began: float, inertia: list[float], options: KMeansOptions) -> float:
    """Tell of slow iterations; returns when the last was told of."""
    now = time.monotonic()
    if now - began < _SECONDS_BETWEEN_LINES or dist.rank():
        return began
    logger.info("k-means: iteration %d of %d, inertia %.6g", len(inertia), options.kmeans_iters, inertia[-1])
    return now
