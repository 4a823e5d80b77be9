"""Images near images: the neighbours of every image, duplicates, outliers, and what resembles a given picture.

Legend of suffixes: N readable images, M images of a cell, Q queries, F features, E neighbours, P pixels of a grey copy.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clusterssl.cluster.kmeans import KMeansOptions, spherical_kmeans
from clusterssl.config import require_numbers
from clusterssl.evals.knn import CHUNK, nearest
from clusterssl.labelling.clusters import block_rows
from clusterssl.labelling.scan import Rows, Scan
from clusterssl.rng import Stream, permutation

logger = logging.getLogger(__name__)

CELL = 20_000
"""images up to which the search is exact"""
_IMAGES_OF_A_CELL = 5_000
_LEARNED_FROM = 50
_FLAT = 2.0
_SAME = 1.0
_PAIRS = 2**16


@dataclass(frozen=True)
class NeighbourOptions:
    """Neighbours."""

    near: tuple[str, ...] = ()
    """pictures whose nearest images are wanted"""
    near_count: int = 24
    """how many of them, for each picture"""
    neighbours: int = 5
    """nearest images of every image that are looked at for duplicates and outliers; 0: neither is looked for"""
    duplicate_similarity: float = 0.98
    """correlation of the grey 16 x 16 copies of two neighbouring images from which they count as duplicates"""
    outlier_spread: float = 3.0
    """an image is an outlier when its mean distance to its neighbours exceeds the third quartile by so many
    interquartile ranges"""

    def __post_init__(self) -> None:
        require_numbers(self, "near_count", least=1)
        require_numbers(self, "neighbours", "outlier_spread", least=0)
        require_numbers(self, "duplicate_similarity", above=0, most=1)


class Duplicates(NamedTuple):
    """Groups of images that show the same, larger groups first."""

    groups: list[NDArray[np.int64]]
    """dataset positions, ascending"""
    similarity: list[NDArray[np.float32]]
    """of each image: its highest correlation with another of the group"""


class Outliers(NamedTuple):
    """Images that resemble no other, the farthest first."""

    positions_O: NDArray[np.int64]
    distance_O: NDArray[np.float32]
    """mean of 1 - cosine to the neighbours"""
    threshold: float


def neighbours_of_all(scan: Scan, count: int, *, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The nearest other images of every readable image by the cosine of their features.

    Exact up to 20,000 images. Above, k-means divides the images into cells of about 5,000 and every image is compared
    with those of the two nearest cells, so that time grows with N and not with its square, and a neighbour beyond the
    border of both is missed. Memory: the features of one cell.

    Returns:
        Cosines [N, E], highest first, and indices into `scan.readable()`, int64 [N, E]; -1 with cosine -1 where there
        are fewer.
    """
    kept, rows = scan.readable(), scan.rows("features")
    count = min(count, len(kept) - 1)
    cosine_NE, index_NE = torch.full((len(kept), count), -1.0), torch.full((len(kept), count), -1)
    if count < 1:
        return cosine_NE, index_NE
    cells_N2 = _cells(rows, kept, seed, device)
    cells = np.unique(cells_N2[:, 0])
    for number, cell in enumerate(cells):
        members_M = np.flatnonzero(cells_N2[:, 0] == cell)
        bank_MF = rows[kept[members_M]].to(device)
        queries_Q = np.flatnonzero((cells_N2 == cell).any(1))
        step = block_rows(rows)
        for start in range(0, len(queries_Q), step):
            part_Q = queries_Q[start : start + step]
            chunks = rows[kept[part_Q]].split(CHUNK)
            found = nearest(bank_MF, chunks, min(count + 1, len(members_M)), device=device)
            cosine_QE, at_QE = (torch.cat([pair[side] for pair in found]).cpu() for side in (0, 1))
            _merge(cosine_NE, index_NE, part_Q, cosine_QE, torch.from_numpy(members_M)[at_QE])
        if len(cells) > 1 and (number + 1) % 10 == 0:
            logger.info("neighbours: %d of %d cells", number + 1, len(cells))
    return cosine_NE, index_NE


def _merge(cosine_NE: Tensor, index_NE: Tensor, part_Q: NDArray[np.int64], cosine_QE: Tensor, index_QE: Tensor) -> None:
    """Take what was found for some images into their lists; nobody is a neighbour of itself."""
    own_QE = index_QE == torch.from_numpy(part_Q)[:, None]
    cosine_QE = torch.cat([cosine_NE[part_Q], cosine_QE.masked_fill(own_QE, -2)], dim=1)
    index_QE = torch.cat([index_NE[part_Q], index_QE], dim=1)
    best_QE, place_QE = cosine_QE.topk(cosine_NE.shape[1], dim=1)
    cosine_NE[part_Q], index_NE[part_Q] = best_QE, index_QE.gather(1, place_QE)


def _cells(rows: Rows, kept: NDArray[np.int64], seed: int, device: torch.device) -> NDArray[np.int64]:
    """The nearest and the second nearest cell of every image, int64 [N, 2]."""
    if len(kept) <= CELL:
        return np.zeros((len(kept), 1), dtype=np.int64)
    number = -(-len(kept) // _IMAGES_OF_A_CELL)
    seen = np.sort(permutation(seed, Stream.KMEANS, 1, len(kept))[: _LEARNED_FROM * number])
    options = KMeansOptions(kmeans_iters=10)
    centres_KF = spherical_kmeans(rows[kept[seen]].to(device), number, options, seed=seed).centroids_KD
    step = block_rows(rows)
    parts = [
        (rows[kept[start : start + step]].to(device) @ centres_KF.T).topk(2, dim=1).indices.cpu()
        for start in range(0, len(kept), step)
    ]
    return torch.cat(parts).numpy()


def duplicates(scan: Scan, index_NE: Tensor, least: float) -> Duplicates:
    """Groups of neighbours whose grey copies correlate by `least` or more; chains of such pairs are one group.

    Copies without contrast, of which a correlation says nothing, must have the same mean grey to a level.
    """
    kept, grey = scan.readable(), scan.rows("grey")
    first, second, found = [], [], []
    step = max(1, _PAIRS // max(index_NE.shape[1], 1))
    for start in range(0, len(kept), step):
        block = index_NE[start : start + step].numpy()
        one = np.repeat(np.arange(start, start + len(block)), block.shape[1])
        other = block.reshape(-1)
        one, other = one[other >= 0], other[other >= 0]
        value = _correlation(grey[kept[one]].numpy(), grey[kept[other]].numpy())
        close = value >= least
        first.append(one[close])
        second.append(other[close])
        found.append(value[close])
    return _grouped(kept, np.concatenate(first), np.concatenate(second), np.concatenate(found))


def _correlation(a_RP: NDArray[np.uint8], b_RP: NDArray[np.uint8]) -> NDArray[np.float32]:
    a, b = a_RP.astype(np.float32), b_RP.astype(np.float32)
    level = np.abs(a.mean(1) - b.mean(1))
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    spread_a, spread_b = a.std(1), b.std(1)
    flat = np.minimum(spread_a, spread_b) < _FLAT
    value = (a * b).mean(1) / np.maximum(spread_a * spread_b, 1e-9)
    same = (np.maximum(spread_a, spread_b) < _FLAT) & (level <= _SAME)
    return np.where(flat, same.astype(np.float32), np.minimum(value, 1)).astype(np.float32)


def _grouped(
    kept: NDArray[np.int64], one: NDArray[np.int64], other: NDArray[np.int64], value: NDArray[np.float32]
) -> Duplicates:
    """Connected components of the pairs."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    involved, place = np.unique(np.concatenate([one, other]), return_inverse=True)
    if not len(involved):
        return Duplicates([], [])
    best = np.zeros(len(involved), dtype=np.float32)
    np.maximum.at(best, place, np.tile(value, 2))
    edges = coo_matrix((np.ones(len(one)), (place[: len(one)], place[len(one) :])), shape=(len(involved),) * 2)
    _, group = connected_components(edges, directed=False)
    order = np.argsort(group, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(group[order])) + 1)
    parts.sort(key=lambda part: (-len(part), involved[part[0]]))
    return Duplicates([kept[involved[part]] for part in parts], [best[part] for part in parts])


def outliers(scan: Scan, cosine_NE: Tensor, spread: float) -> Outliers:
    """Images whose mean distance to their neighbours lies far above that of most (Ramaswamy et al. 2000; Tukey's rule).

    Args:
        scan: complete.
        cosine_NE: of `neighbours_of_all`.
        spread: interquartile ranges above the third quartile.
    """
    found_NE = cosine_NE > -1
    distance_N = torch.where(found_NE, 1 - cosine_NE, 0).sum(1).div(found_NE.sum(1).clamp(min=1)).numpy()
    low, high = np.quantile(distance_N, [0.25, 0.75])
    threshold = float(high + spread * (high - low))
    far = np.flatnonzero(distance_N > threshold)
    far = far[np.argsort(-distance_N[far], kind="stable")]
    return Outliers(scan.readable()[far], distance_N[far], threshold)


def nearest_to(scan: Scan, queries_QF: Tensor, count: int) -> tuple[Tensor, NDArray[np.int64]]:
    """The images whose features are nearest to some others: cosines [Q, E], highest first, and dataset positions."""
    kept, rows = scan.readable(), scan.rows("features")
    step, count = block_rows(rows), min(count, len(kept))
    cosine_QE, at_QE = torch.empty(len(queries_QF), 0), torch.empty(len(queries_QF), 0, dtype=torch.int64)
    for start in range(0, len(kept), step):
        block_BF = rows[kept[start : start + step]].to(queries_QF.device)
        (found,) = nearest(block_BF, [queries_QF], min(count, len(block_BF)), device=queries_QF.device)
        cosine_QE, at_QE = torch.cat([cosine_QE, found[0].cpu()], 1), torch.cat([at_QE, found[1].cpu() + start], 1)
        cosine_QE, place_QE = cosine_QE.topk(min(count, cosine_QE.shape[1]), dim=1)
        at_QE = at_QE.gather(1, place_QE)
    return cosine_QE, kept[at_QE.numpy()]
