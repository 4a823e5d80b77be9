"""Visiting images so that every cluster is trained on equally often (DeepCluster, section 3.2 of arXiv 1807.05520).

Shape suffixes: N images, C clusters that have images, S draws from each, L images of an epoch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clusterssl import rng

Ints = NDArray[np.int64]


def balanced_order(labels: ArrayLike, length: int, seed: int, epoch: int) -> Ints:
    """Dataset positions of one epoch, drawn uniformly over the clusters that have images.

    Every cluster gives S = length // C + 1 images, with replacement if it has no more than S; they are shuffled and cut
    to `length`. A pure function of its arguments.

    Args:
        labels: whole numbers from 0 [N], cluster of each image; at least one image.
        length: L.
        seed: of the run.
        epoch: number of the epoch.

    Returns:
        Positions in the dataset, int64 [L].
    """
    drawn = draws(labels, length, seed, epoch).reshape(-1)
    keys = _uniform(seed, epoch, np.size(labels) + drawn.size, drawn.size)
    return drawn[np.argsort(keys, kind="stable")[:length]]


def draws(labels: ArrayLike, length: int, seed: int, epoch: int) -> Ints:
    """The images that `balanced_order` shuffles and cuts, int64 [C, S]: row c holds members of the c-th cluster."""
    labels_N = np.asarray(labels)
    counts = np.bincount(labels_N)
    size_C1 = counts[counts > 0][:, None]
    shape = len(size_C1), length // len(size_C1) + 1
    shuffled_N = np.lexsort((_uniform(seed, epoch, 0, labels_N.size), labels_N))  # inside each cluster
    start_C1 = np.cumsum(size_C1)[:, None] - size_C1
    anew_CS = _uniform(seed, epoch, labels_N.size, shape[0] * shape[1]).reshape(shape) * size_C1
    return shuffled_N[start_C1 + np.where(size_C1 > shape[1], np.arange(shape[1]), anew_CS.astype(np.int64))]


def _uniform(seed: int, epoch: int, first: int, count: int) -> NDArray[np.float64]:
    return rng.uniform(seed, rng.Stream.BALANCE, epoch, np.arange(first, first + count), 1)[:, 0]


def as_published(order: Ints, labels: ArrayLike) -> Ints:
    """The images that the published loop visits where it meant those of `order`.

    It looks positions of the dataset up in a list of the same images sorted by cluster, so that large clusters are
    visited in proportion to their size.
    """
    return np.argsort(np.asarray(labels), kind="stable")[order]
