from __future__ import annotations

import numpy as np
import torch

from clusterssl.cluster.kmeans import KMeansOptions, spherical_kmeans
from clusterssl.cluster.rows import GlobalRows
from clusterssl.cluster.seeding import random_rows
from tests.cluster.blobs import blobs


def test_random_start_takes_every_row_equally_often() -> None:
    rows = GlobalRows(torch.arange(20.0)[:, None])
    taken = torch.cat([random_rows(rows, 5, 0, draw)[:, 0] for draw in range(2000)])
    assert all(len(part.unique()) == 5 for part in taken.split(5))
    counts = torch.bincount(taken.long(), minlength=20)
    assert abs(counts - 500).max() < 5 * np.sqrt(500 * 0.75)


def test_plus_plus_finds_all_far_groups_where_a_random_start_does_not() -> None:
    x = blobs(2000, 16, 40, spread=0.02)
    far = [spherical_kmeans(x, 40, KMeansOptions(kmeans_init="kmeans++"), seed=s).inertia[-1] for s in range(3)]
    assert max(far) < 0.3 * min(spherical_kmeans(x, 40, seed=s).inertia[-1] for s in range(3))
