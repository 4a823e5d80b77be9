from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor

from clusterssl import dist
from clusterssl.cluster.balanced import as_published, balanced_order
from clusterssl.cluster.kmeans import KMeansOptions
from clusterssl.cluster.roundlog import record_round
from clusterssl.cluster.rounds import ClusteringOptions, ClusterLabels, Round, cluster_features
from clusterssl.errors import UserError
from tests.ranks import run_ranks

CPU = torch.device("cpu")
SIX = ClusteringOptions(nmb_cluster=6, pca_dim=5)
PIC = ClusteringOptions(clustering="PIC", pca_dim=5, pic_neighbours=3)


def clustered(x: Tensor, options: ClusteringOptions, seed: int = 0, epoch: int = 0) -> Round:
    return cluster_features(x, options, KMeansOptions(kmeans_iters=20), CPU, seed, epoch)


def labels_of(options: ClusteringOptions, num_images: int, feature_dim: int, seed: int = 0) -> ClusterLabels:
    sizes = {"num_images": num_images, "feature_dim": feature_dim}
    return ClusterLabels(options, KMeansOptions(kmeans_iters=20), **sizes, seed=seed, device=CPU)


def blobs(per_blob: int = 20, count: int = 6, dim: int = 10) -> tuple[Tensor, Tensor]:
    """Points in well separated groups, in random order, and their groups; float64."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(count, dim, generator=generator, dtype=torch.float64) * 10
    groups = torch.arange(count).repeat(per_blob)[torch.randperm(count * per_blob, generator=generator)]
    return centres[groups] + torch.randn(len(groups), dim, generator=generator, dtype=torch.float64) * 0.1, groups


def test_clusters_are_the_groups_that_are_there() -> None:
    x, groups = blobs()
    found = clustered(x, SIX)
    assert found.number == 6 and found.labels_N.dtype == torch.int32 and found.loss > 0
    for label in found.labels_N.unique():
        assert len(groups[found.labels_N == label].unique()) == 1, "no cluster mixes groups"
    graph = clustered(x, PIC)
    assert graph.number == int(graph.labels_N.max()) + 1 >= 6 and graph.loss == 0
    for label in graph.labels_N.unique():
        assert len(groups[graph.labels_N == label].unique()) == 1


def test_rounds_differ_by_seed_and_epoch_and_repeat() -> None:
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(1))
    options = ClusteringOptions(nmb_cluster=20, pca_dim=8)
    first = clustered(x, options, 3, 0).labels_N
    assert torch.equal(clustered(x, options, 3, 0).labels_N, first)
    assert not torch.equal(clustered(x, options, 3, 1).labels_N, first)
    assert not torch.equal(clustered(x, options, 4, 0).labels_N, first)


def batches(x: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """As `Feed.plain` gives them: this rank's share, in order."""
    first, end = dist.share(len(x))
    return [(x[at : min(at + size, end)], torch.arange(at, min(at + size, end))) for at in range(first, end, size)]


def found(rank: int, world_size: int, options: ClusteringOptions) -> Round:
    x = torch.randn(90, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    clusters = labels_of(options, 90, 12, seed=5)
    return clusters.find(lambda images: images, batches(x, 7), epoch=2)


@pytest.mark.parametrize("options", [SIX, PIC], ids=["k-means", "PIC"])
def test_many_ranks_find_what_one_finds(options: ClusteringOptions) -> None:
    alone = found(0, 1, options)
    for part in run_ranks(found, 3, options):
        assert torch.equal(part.labels_N, alone.labels_N) and part.number == alone.number
        assert part.loss == pytest.approx(alone.loss, rel=1e-9)


def test_features_of_all_images_are_clustered_in_dataset_order() -> None:
    x, _ = blobs()
    clusters = labels_of(SIX, len(x), 10)
    round_ = clusters.find(lambda images: images * 2, batches(x, 32), epoch=4)
    assert torch.equal(round_.labels_N, clustered(2 * x, SIX, 0, 4).labels_N)
    assert (clusters.labels_N == -1).all(), "nothing changes before the method takes the round"


def test_order_and_labels_follow_the_clusters() -> None:
    options = ClusteringOptions(nmb_cluster=3, reassign=0.5)
    clusters = labels_of(options, 100, 8, seed=9)
    clusters.labels_N = torch.cat([torch.zeros(90), torch.ones(10)]).int()
    labels = clusters.labels_N.numpy()
    assert (clusters.order(3) == balanced_order(labels, 50, 9, 3)).all()
    assert clusters.of(torch.tensor([95, 2, 95])).tolist() == [1, 0, 1]
    again = labels_of(ClusteringOptions(nmb_cluster=3, reassign=0.5, published_sampler=True), 100, 8, seed=9)
    again.load_state_dict(clusters.state_dict())
    assert (again.order(3) == as_published(clusters.order(3), labels)).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"nmb_cluster": 11}, "--nmb_cluster 11: more clusters than the 10 images"),
        ({"clustering": "PIC", "pic_neighbours": 10}, "--pic_neighbours 10: needs more than 10 images, there are 10"),
        ({"nmb_cluster": 0}, "--nmb_cluster 0: must be at least 2"),
        ({"reassign": -1.0}, "--reassign -1.0"),
        ({"pic_sigma": float("nan")}, "--pic_sigma nan"),
        ({"pca_dim": 0}, "--pca_dim 0"),
    ],
)
def test_refuses_what_does_not_fit(options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        labels_of(ClusteringOptions(**options), 10, 8)


def test_says_how_many_components_and_bytes_there_are(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "clusterssl"):
        labels_of(ClusteringOptions(nmb_cluster=5), 2048, 64)
    assert "clustering 64 components (--pca_dim 256) of 64 features; these take 0.5 MiB" in caplog.text


def test_record_of_a_round(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    labels = torch.tensor([0, 0, 1, 1, 3, 3, 3], dtype=torch.int32)
    before = torch.tensor([1, 1, 1, 0, 2, 2, 0], dtype=torch.int32)
    classes = torch.tensor([0, 0, -1, 1, 1, 1, 1])
    with caplog.at_level(logging.INFO, "clusterssl"):
        path = record_round(tmp_path, 12, Round(labels, 5, 0.25), before, classes)
        first = record_round(tmp_path, 0, Round(labels, 5, 0.25), torch.full((7,), -1), torch.full((7,), -1))
    assert path == tmp_path / "clusters" / "epoch0012.npz" and "3 clusters of 2 to 3 images" in caplog.text
    held = np.load(path)
    assert (held["labels"] == labels.numpy()).all() and held["labels"].dtype == np.int32 and held["loss"] == 0.25
    assert held["nmi_before"] == pytest.approx(normalized_mutual_info_score(before, labels))
    known = classes >= 0
    assert held["nmi_classes"] == pytest.approx(normalized_mutual_info_score(classes[known], labels[known]))
    assert np.isnan(np.load(first)["nmi_before"]) and "nan" not in caplog.text
