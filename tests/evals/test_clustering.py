"""Agreement of clusters and classes against the published numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from clusterssl.evals.clustering import agreement, cluster_scores

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "eval_metrics.npz"


@pytest.mark.parametrize(
    ("case", "accuracy"), [("cls_same", True), ("cls_over", True), ("km_same", True), ("km_over", False)]
)
def test_published_numbers(case: str, accuracy: bool) -> None:
    with np.load(GOLDEN) as arrays:
        found = agreement(arrays[f"{case}_preds"], arrays[f"{case}_targets"])
        expected = arrays[f"{case}_nmi_ami_ari_acc_percent"]
    assert [found["nmi"], found["ami"], found["ari"]] == pytest.approx(expected[:3], abs=6e-4)
    if case != "km_over":  # the published mapping of surplus clusters in km_over is off by one
        assert found.get("majority_accuracy", found["hungarian_accuracy"]) == pytest.approx(expected[3], abs=6e-4)


def test_matching_is_one_to_one_and_the_majority_takes_the_rest() -> None:
    labels = [0] * 6 + [1] * 4
    clusters = [0, 0, 0, 1, 1, 2, 3, 3, 3, 2]
    found = agreement(clusters, labels)
    assert found["hungarian_accuracy"] == pytest.approx(60)  # clusters 0 and 3
    assert found["majority_accuracy"] == pytest.approx(90)  # and 2 of cluster 1, 1 of cluster 2
    assert "majority_accuracy" not in agreement(labels, labels)


def test_fewer_clusters_than_classes() -> None:
    found = agreement([0, 0, 0, 1, 1, 1], [0, 0, 1, 2, 2, 2])
    assert found["hungarian_accuracy"] == pytest.approx(100 * 5 / 6)


def test_numbers_of_clusters_do_not_matter() -> None:
    rng = np.random.default_rng(0)
    labels, clusters = rng.integers(5, size=200), rng.integers(5, size=200)
    renamed = np.array([40, 3, 17, 8, 99])[clusters]
    assert agreement(renamed, labels) == pytest.approx(agreement(clusters, labels))


def test_k_means_finds_separated_clusters_and_repeats_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4).repeat(50)
    points = 10 * torch.eye(4)[labels] + torch.randn(200, 4, generator=generator)
    found = cluster_scores(points, labels, k=4, seed=1)
    assert found == pytest.approx({"nmi": 100, "ami": 100, "ari": 100, "hungarian_accuracy": 100})
    noise = torch.randn(200, 4, generator=generator)
    assert cluster_scores(noise, labels, k=8, seed=3) == cluster_scores(noise, labels, k=8, seed=3)
    assert cluster_scores(noise, labels, k=4, seed=3)["nmi"] < 15
