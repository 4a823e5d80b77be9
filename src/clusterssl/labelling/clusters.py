"""The clusters of a scanned folder: what the network's head said, or k-means of the features.

Legend of suffixes: N readable images, F features, K clusters.
"""

from __future__ import annotations

import logging
import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from clusterssl.cluster.kmeans import KMeansOptions, spherical_kmeans
from clusterssl.errors import UserError
from clusterssl.labelling.reading import two_best
from clusterssl.labelling.scan import Rows, Scan
from clusterssl.rng import Stream, uniform

logger = logging.getLogger(__name__)

BLOCK_BYTES = 2**26
"""of features that are in memory at a time"""
_SAMPLE_BYTES = 2**28
_IMAGES_PER_CLUSTER = 40
_STARTS, _ITERATIONS = 3, 50
_TEMPERATURE = 0.1
_MOST_BY_ITSELF = 1000


class Labels(NamedTuple):
    """Clusters of the readable images, by dataset position."""

    title: str
    """"the network's own clusters" or "k-means, 20 of backbone features" """
    number: int
    """K; 0 where nobody knows: a head's clusters without images are not counted"""
    positions_N: NDArray[np.int64]
    clusters_N: NDArray[np.int64]
    confidence_N: NDArray[np.float32]
    second_N: NDArray[np.int64]
    second_confidence_N: NDArray[np.float32]


def block_rows(rows: Rows) -> int:
    """How many rows of features are read at a time."""
    return max(1, BLOCK_BYTES // (4 * rows.shape[1]))


def of_head(scan: Scan) -> Labels:
    """What the network's head said; heads after the first are named."""
    kept, head = scan.readable(), scan.facts["head"]
    title = "the network's own clusters" + f", head {head}" * bool(head)
    return _labels(title, 0, kept, scan.rows("clusters")[kept].numpy())


def default_k(images: int) -> int:
    """Clusters where nobody says how many: the root of half the number of images, at most 1,000."""
    return max(1, min(_MOST_BY_ITSELF, round(math.sqrt(images / 2))))


def by_kmeans(scan: Scan, k: int, *, seed: int, device: torch.device) -> Labels:
    """k-means of the features by angle (Dhillon and Modha 2001); confidences are softmax(cosine / 0.1).

    Centres are learned from at most 256 MiB of features, though from 40 images a cluster at least, and every image
    then goes to the nearest one.

    Args:
        scan: complete.
        k: number of clusters.
        seed: of the starts, of which the best of three counts, and of the images learned from.
        device: where to compute.

    Raises:
        UserError: more clusters than images.
    """
    kept, rows = scan.readable(), scan.rows("features")
    if k > len(kept):
        raise UserError(f"--k {k}: there are only {len(kept)} images; ask for fewer clusters")
    chosen = _sample(len(kept), max(_SAMPLE_BYTES // (4 * rows.shape[1]), _IMAGES_PER_CLUSTER * k), seed)
    sample_MF = rows[kept[chosen]].to(device)
    logger.info("k-means: %d clusters of %d images, %d starts", k, len(sample_MF), _STARTS)
    options = KMeansOptions(kmeans_iters=_ITERATIONS, kmeans_init="kmeans++")
    found = [spherical_kmeans(sample_MF, k, options, seed=seed, draw=start) for start in range(_STARTS)]
    centres_KF = min(found, key=lambda clusters: clusters.inertia[-1]).centroids_KD
    del sample_MF
    step, parts = block_rows(rows), []
    for start in range(0, len(kept), step):
        block_BF = rows[kept[start : start + step]].to(device)
        parts.append(two_best(block_BF @ centres_KF.T / _TEMPERATURE).cpu())
    title = f"k-means, {k} of {scan.facts['features']} features"
    return _labels(title, k, kept, torch.cat(parts).numpy())


def _sample(images: int, most: int, seed: int) -> NDArray[np.int64]:
    """Random rows in ascending order, all where there are few."""
    if images <= most:
        return np.arange(images)
    keys = uniform(seed, Stream.KMEANS, 0, np.arange(images), 1)[:, 0]
    return np.sort(np.argpartition(keys, most)[:most])


def _labels(title: str, number: int, kept: NDArray[np.int64], said_N4: NDArray[np.float32]) -> Labels:
    cluster, second = said_N4[:, 0].astype(np.int64), said_N4[:, 2].astype(np.int64)
    return Labels(title, number, kept, cluster, said_N4[:, 1], second, said_N4[:, 3])
