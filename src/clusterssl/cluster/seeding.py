"""First centroids of k-means: random rows, or rows far from each other; the same on any number of ranks.

Shape suffixes: K clusters, D dimension, M sampled rows.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from clusterssl import dist
from clusterssl.cluster.rows import GlobalRows
from clusterssl.rng import Stream, uniform

SAMPLE = 16
"""rows per cluster that k-means++ chooses among"""


def random_rows(rows: GlobalRows, clusters: int, seed: int, draw: int) -> Tensor:
    """K different rows, all equally likely, [K, D]; a collective call.

    Args:
        rows: rows of all ranks, at least K.
        clusters: K.
        seed: of the run.
        draw: number of the draw; different numbers give independent rows.
    """
    return rows.fetch(rows.x_ND, rows.smallest(rows.draw_keys(seed, draw), clusters)[1])


def plus_plus(rows: GlobalRows, clusters: int, seed: int, draw: int) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii 2007) on a random sample of at most 16 K rows, [K, D]; a collective call.

    Each centroid is a row drawn with probability proportional to its squared distance to the nearest centroid so far.
    On the sample, which every rank fetches, this takes seconds for K = 3000 where K passes over all rows take minutes.

    Args:
        rows: rows of all ranks, at least K.
        clusters: K.
        seed: of the run.
        draw: number of the draw.
    """
    sample_MD = random_rows(rows, min(SAMPLE * clusters, rows.total), seed, draw)
    chance_K = torch.from_numpy(uniform(seed, Stream.KMEANS, draw, -1 - np.arange(clusters), 1)[:, 0])
    chance_K = chance_K.to(sample_MD.device)
    square_M = sample_MD.square().sum(1)
    distance_M = torch.full_like(square_M, torch.inf)
    chosen_K = torch.zeros(clusters, dtype=torch.int64, device=sample_MD.device)  # the sample is in random order
    for k in range(1, clusters):
        last = chosen_K[k - 1]
        to_last_M = square_M + square_M[last] - 2 * (sample_MD @ sample_MD[last])
        distance_M = torch.minimum(distance_M, to_last_M.clamp_(min=0))
        distance_M[last] = 0
        cumulated_M = distance_M.double().cumsum(0)
        chosen_K[k] = torch.searchsorted(cumulated_M, chance_K[k] * cumulated_M[-1], right=True)
        chosen_K[k].clamp_(max=len(sample_MD) - 1)  # when all rows are equal
    return dist.broadcast_(sample_MD[chosen_K])
