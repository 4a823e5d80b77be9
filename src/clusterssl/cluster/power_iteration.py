"""Power iteration clustering of a nearest-neighbour graph, DeepCluster's alternative to k-means.

Lin and Cohen 2010, as used by Douze et al. 2017 (https://arxiv.org/abs/1709.03305) and Caron et al. 2018
(https://arxiv.org/abs/1807.05520, appendix). The number of clusters is not given, it follows from the graph.

Shape suffixes: N points, E neighbours of each, L links (pairs with weight, both directions).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clusterssl import dist
from clusterssl.cluster.neighbours import nearest_neighbours

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class GraphClusters(NamedTuple):
    """Labels int64 [N] before and after single points joined the cluster of a neighbour; both count from 0."""

    of_graph: Ints
    merged: Ints


class _Links(NamedTuple):
    """A symmetric sparse matrix by rows, columns increasing inside a row."""

    row_L: Ints
    column_L: Ints
    weight_L: Floats
    start_N: Ints
    """position of the first link of each row"""


def power_iteration_clustering(
    x_ND: Tensor, *, neighbours: int = 5, sigma: float = 0.2, alpha: float = 0.001, iterations: int = 200
) -> Tensor:
    """Cluster the rows of all ranks; many ranks find what one finds.

    The neighbour search is shared among ranks; the graph is then clustered by rank 0 on its CPU, in about
    100 bytes for each of N * neighbours * 2 links (1.3 GB for ImageNet).

    Args:
        x_ND: this rank's rows, as for `nearest_neighbours`.
        neighbours: of each row in the graph.
        sigma: width of the kernel exp(-squared distance / sigma^2).
        alpha: weight of the graph against the uniform distribution in an iteration.
        iterations: number of them.

    Returns:
        int64 labels of the rows of all ranks, in rank order, on every rank and on the device of the rows.

    Raises:
        UserError: there are not more rows than neighbours.
    """
    index_NE, square_NE = (dist.all_gather_cat(part) for part in nearest_neighbours(x_ND, neighbours))
    labels_N = torch.empty(index_NE.shape[0], dtype=torch.int64)
    if dist.rank() == 0:
        found = clusters_of_graph(index_NE.cpu().numpy(), square_NE.cpu().numpy(), sigma, alpha, iterations)
        labels_N = torch.from_numpy(found.merged)
    return dist.broadcast_(labels_N.to(x_ND.device))


def clusters_of_graph(
    index_NE: NDArray[np.integer], square_NE: NDArray[np.floating], sigma: float, alpha: float, iterations: int
) -> GraphClusters:
    """Cluster points of which the neighbours are known.

    Each point points to the neighbour towards which the stationary distribution rises most; points from which it rises
    nowhere are the roots of the clusters.

    Args:
        index_NE: other points, in order of distance.
        square_NE: squared distances to them.
        sigma: width of the kernel exp(-squared distance / sigma^2).
        alpha: weight of the graph in an iteration.
        iterations: number of them.
    """
    links = _links(index_NE.astype(np.int64), np.exp(-square_NE.astype(np.float64) / sigma**2))
    pointer_N = _steepest(links, _stationary(links, alpha, iterations))
    while not np.array_equal(following_N := pointer_N[pointer_N], pointer_N):
        pointer_N = following_N
    labels_N = np.unique(pointer_N, return_inverse=True)[1]
    return GraphClusters(labels_N, _merge_singles(labels_N, index_NE))


def _links(index_NE: Ints, weight_NE: Floats) -> _Links:
    """A + A^T for the matrix A of the weights of neighbours."""
    size, count = index_NE.shape
    here_L, there_L = np.repeat(np.arange(size), count), index_NE.reshape(-1)
    key_L = np.concatenate([here_L * size + there_L, there_L * size + here_L])
    order_L = np.argsort(key_L, kind="stable")
    key_L, weight_L = key_L[order_L], np.tile(weight_NE.reshape(-1), 2)[order_L]
    first = np.flatnonzero(np.diff(key_L, prepend=-1))  # mutual neighbours have two links, which add up
    row_L, column_L = np.divmod(key_L[first], size)
    return _Links(row_L, column_L, np.add.reduceat(weight_L, first), np.flatnonzero(np.diff(row_L, prepend=-1)))


def _stationary(links: _Links, alpha: float, iterations: int) -> Floats:
    """Power iteration v <- alpha W^T v + (1 - alpha) / N, scaled to sum 1."""
    size = len(links.start_N)
    v_N = np.full(size, 1 / size)
    for _ in range(iterations):
        v_N = alpha * np.add.reduceat(links.weight_L * v_N[links.column_L], links.start_N) + (1 - alpha) / size
        v_N /= v_N.sum()
    return v_N


def _steepest(links: _Links, v_N: Floats) -> Ints:
    """The linked point with the largest positive weighted rise of v, the lowest one on ties; itself without a rise."""
    rise_L = links.weight_L * (v_N[links.column_L] - v_N[links.row_L])
    largest_N = np.maximum.reduceat(rise_L, links.start_N)
    best = np.flatnonzero((rise_L == largest_N[links.row_L]) & (rise_L > 0))
    row, where = np.unique(links.row_L[best], return_index=True)
    pointer_N = np.arange(len(v_N))
    pointer_N[row] = links.column_L[best[where]]
    return pointer_N


def _merge_singles(labels_N: Ints, index_NE: NDArray[np.integer]) -> Ints:
    """Move the only point of a cluster to that of its nearest neighbour in a larger one; renumber what remains."""
    several_N = np.bincount(labels_N)[labels_N] > 1
    single = np.flatnonzero(~several_N)
    joins = several_N[index_NE[single]]
    nearest = index_NE[single, joins.argmax(1)]
    merged_N = labels_N.copy()
    merged_N[single] = np.where(joins.any(1), labels_N[nearest], labels_N[single])
    return np.unique(merged_N, return_inverse=True)[1]
