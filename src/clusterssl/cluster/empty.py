"""What keeps clusters from being empty, with the same outcome on any number of ranks.

In every iteration an empty centroid takes half of the cluster that is largest then: both become its centroid times
1 + 1/1024 and 1 - 1/1024, the signs alternating over the coordinates, and the next search divides its rows between them
(the rule of faiss, but for the largest cluster instead of a random one). After the last search, each cluster that is
still empty takes the row farthest from its centroid, among clusters of more than one row. As long as there are as many
rows as clusters, none ends empty.

Shape suffixes: N rows of this rank, K clusters, D dimension, E empty clusters.
"""

from __future__ import annotations

import heapq

import numpy as np
import torch
from torch import Tensor

from clusterssl.cluster.rows import GlobalRows

_SPLIT = 1 / 1024


def split_largest(centroids_KD: Tensor, counts_K: Tensor) -> Tensor:
    """Centroids in which every empty one has taken half of a large cluster; the first of equally large ones.

    Args:
        centroids_KD: of all clusters.
        counts_K: rows of each over all ranks.
    """
    empty_E = torch.nonzero(counts_K == 0)[:, 0].tolist()
    if not empty_E:
        return centroids_KD
    new_KD = centroids_KD.clone()
    sign_D = 1 - 2 * (torch.arange(new_KD.shape[1], device=new_KD.device) % 2)
    largest = [(-count, k) for k, count in enumerate(counts_K.tolist())]
    heapq.heapify(largest)
    for k in empty_E:
        count, donor = heapq.heappop(largest)
        new_KD[k] = new_KD[donor] * (1 + _SPLIT * sign_D)
        new_KD[donor] *= 1 - _SPLIT * sign_D
        heapq.heappush(largest, (-(-count // 2), k))
        heapq.heappush(largest, (count + -count // 2, donor))
    return new_KD


def fill_empty(
    rows: GlobalRows, labels_N: Tensor, distances_N: Tensor, counts_K: Tensor, centroids_KD: Tensor
) -> tuple[Tensor, Tensor]:
    """Give every empty cluster one row; a collective call.

    Args:
        rows: rows of all ranks.
        labels_N: clusters of this rank's rows, changed in place.
        distances_N: squared distances of this rank's rows to their centroids.
        counts_K: rows of each cluster over all ranks.
        centroids_KD: of all clusters.

    Returns:
        Centroids and counts after the moves.
    """
    empty_E = np.flatnonzero(counts_K.cpu().numpy() == 0)
    if not len(empty_E):
        return centroids_KD, counts_K
    # Of K rows at most one per cluster is the last of its cluster and must stay, so at least E can move.
    _, places = rows.smallest(-distances_N.double().cpu().numpy(), len(counts_K))
    counts: list[int] = counts_K.tolist()
    moved: list[int] = []
    for position, label in enumerate(rows.fetch(labels_N, places).tolist()):
        if counts[label] > 1 and len(moved) < len(empty_E):
            counts[label] -= 1
            moved.append(position)
    places = places[moved]
    centroids_KD = centroids_KD.clone()
    centroids_KD[torch.from_numpy(empty_E[: len(moved)])] = rows.fetch(rows.x_ND, places)
    for cluster, place in zip(empty_E.tolist(), places.tolist(), strict=False):
        counts[cluster] = 1
        if place >= 0:
            labels_N[place] = cluster
    return centroids_KD, counts_K.new_tensor(counts)
