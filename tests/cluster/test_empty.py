from __future__ import annotations

import torch
import torch.nn.functional as F

from clusterssl.cluster.empty import fill_empty, split_largest
from clusterssl.cluster.kmeans import KMeansOptions, euclidean_kmeans, spherical_kmeans
from clusterssl.cluster.rows import GlobalRows
from tests.cluster.blobs import blobs


def test_split_leaves_no_cluster_empty_even_of_equal_rows() -> None:
    equal = F.normalize(torch.ones(30, 4), dim=1)
    some = torch.cat([equal, blobs(10, 4, 10)])
    for x, clusters in ((equal, 30), (equal, 7), (some, 40), (some, 25)):
        for run in (spherical_kmeans, euclidean_kmeans):
            found = run(x, clusters)
            counts = torch.bincount(found.labels_N, minlength=clusters)
            assert counts.min() >= 1 and torch.equal(counts, found.counts_K)
            assert torch.isfinite(found.centroids_KD).all()


def test_empty_clusters_take_the_farthest_rows_that_are_not_alone() -> None:
    x = torch.arange(7.0)[:, None]
    labels = torch.tensor([0, 0, 2, 2, 2, 4, 4])
    distances = torch.tensor([1.0, 8.0, 3.0, 3.0, 0.0, 6.0, 7.0])
    centroids = -torch.ones(5, 1)
    moved, counts = fill_empty(GlobalRows(x), labels, distances, torch.tensor([2, 0, 3, 0, 2]), centroids)
    assert labels.tolist() == [0, 1, 2, 2, 2, 4, 3], "rows 1 and 6 are farthest; rows 0 and 5 must stay then"
    assert moved[:, 0].tolist() == [-1, 1, -1, 6, -1] and counts.tolist() == [1, 1, 3, 1, 1]


def test_of_equally_far_rows_that_of_the_smallest_number_moves() -> None:
    labels, distances = torch.zeros(4, dtype=torch.int64), torch.tensor([1.0, 3.0, 3.0, 2.0])
    rows = GlobalRows(torch.arange(4.0)[:, None], torch.tensor([5, 9, 4, 7]))
    fill_empty(rows, labels, distances, torch.tensor([4, 0]), torch.zeros(2, 1))
    assert labels.tolist() == [0, 0, 1, 0]


def test_splitting_halves_the_largest_cluster_again_and_again() -> None:
    centroids = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0], [9.0, 9.0]])
    new = split_largest(centroids, torch.tensor([100, 0, 40, 0, 0]))
    up, down = torch.tensor([1 + 1 / 1024, 1 - 1 / 1024]), torch.tensor([1 - 1 / 1024, 1 + 1 / 1024])
    first = centroids[0]  # 100 -> 50 and 50, then 50 -> 25 and 25 twice: the lower number first
    torch.testing.assert_close(new[2], centroids[2])
    torch.testing.assert_close(new[1], first * up * down)
    torch.testing.assert_close(new[0], first * down * down)
    torch.testing.assert_close(new[3], first * down * up)
    torch.testing.assert_close(new[4], first * up * up)


def test_split_does_better_than_keep_when_clusters_empty() -> None:
    x = blobs(2000, 8, 60, spread=0.05)
    start = x[:1] + 1e-4 * torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    kept = spherical_kmeans(x, F.normalize(start, dim=1), KMeansOptions(kmeans_empty="keep"))
    split = spherical_kmeans(x, F.normalize(start, dim=1))
    assert kept.counts_K.min() == 0 < split.counts_K.min()
    assert split.inertia[-1] < 0.5 * kept.inertia[-1]
