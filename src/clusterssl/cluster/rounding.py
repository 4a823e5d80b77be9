"""From a balanced plan to balanced labels: the largest entries of its rows fill the clusters only nearly evenly.

Shape suffixes: N images of this rank, K clusters, M images that ask to move.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clusterssl import dist
from clusterssl.cluster.kernel import Kernel


@torch.no_grad()
def equal_sizes(kernel: Kernel, potentials_K: Tensor, labels_N: Tensor) -> Tensor:
    """Move images out of clusters that are too large into ones that are too small, those with the least to lose first.

    An image loses the logarithm of the ratio of its entries in the plan. In the end every cluster has N/K images of all
    ranks, rounded down or up. Any number of ranks gives what one rank gives; a collective call, with one pass over the
    images per round, at most K rounds and usually a handful.

    Args:
        kernel: of the plan.
        potentials_K: of the plan.
        labels_N: int64, the largest entries of its rows.
    """
    labels_N = labels_N.clone()
    mine = torch.zeros(dist.size(), dtype=torch.int64)
    mine[dist.rank()] = len(labels_N)
    first_id = int(dist.all_reduce_(mine)[: dist.rank()].sum())
    while (excess_K := _excess(labels_N, kernel.clusters)).any():
        target_N, loss_N = kernel.second_best(potentials_K, labels_N, allowed_K=torch.from_numpy(excess_K < 0))
        labels, targets, losses = (x.cpu().numpy() for x in (labels_N, target_N, loss_N.double()))
        asking_M = _least_to_lose(labels, losses, excess_K)
        moves = np.stack([labels[asking_M], targets[asking_M], asking_M + first_id], 1)
        moves = dist.all_gather_cat(torch.from_numpy(moves)).numpy()
        losses = dist.all_gather_cat(torch.from_numpy(losses[asking_M])).numpy()
        asking_M = _least_to_lose(moves[:, 0], losses, excess_K)
        moves = _granted(moves[asking_M][np.argsort(losses[asking_M], kind="stable")], excess_K)
        moves = moves[(moves[:, 2] >= first_id) & (moves[:, 2] < first_id + len(labels))]
        rows = torch.from_numpy(moves[:, 2] - first_id).to(labels_N.device)
        labels_N[rows] = torch.from_numpy(moves[:, 1]).to(labels_N.device)
    return labels_N


def _excess(labels_N: Tensor, clusters: int) -> NDArray[np.int64]:
    """Images of all ranks above the size that each cluster shall have; the largest are those that round up."""
    counts_K = dist.all_reduce_(torch.bincount(labels_N, minlength=clusters).cpu()).numpy()
    images = int(counts_K.sum())
    wanted_K = np.full(clusters, images // clusters)
    wanted_K[np.argsort(-counts_K, kind="stable")[: images % clusters]] += 1
    return counts_K - wanted_K


def _least_to_lose(
    labels: NDArray[np.int64], losses: NDArray[np.float64], excess_K: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Positions of the labels that may change: of each cluster that is too large, as many as it has too many."""
    rows = np.flatnonzero(excess_K[labels] > 0)
    rows = rows[np.lexsort((rows, losses[rows], labels[rows]))]
    in_order = labels[rows]
    place_in_cluster = np.arange(len(rows)) - np.searchsorted(in_order, in_order)
    return rows[place_in_cluster < excess_K[in_order]]


def _granted(asked: NDArray[np.int64], excess_K: NDArray[np.int64]) -> NDArray[np.int64]:
    """Those of the moves (from, to, image) that still make both clusters better when their turn comes."""
    excess, granted = excess_K.tolist(), []
    for number, (source, target, _) in enumerate(asked.tolist()):
        if excess[source] > 0 and excess[target] < 0:
            excess[source] -= 1
            excess[target] += 1
            granted.append(number)
    return asked[granted]
