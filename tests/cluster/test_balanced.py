from __future__ import annotations

import time

import numpy as np
import pytest
from scipy import stats

from clusterssl.cluster.balanced import as_published, balanced_order, draws
from tests.golden_files import Golden

GOLDEN = Golden("dc_sampler")
CASES = ["uneven", "reassign_half", "many"]


def labels_of(case: str) -> np.ndarray:
    return GOLDEN[f"{case}_cluster_of_image"]


@pytest.mark.parametrize("case", CASES)
def test_counts_per_cluster_are_those_of_the_golden_sampler(case: str) -> None:
    """Up to the draws that the cut after shuffling takes away, which depend on the random numbers."""
    labels, golden = labels_of(case), GOLDEN[f"{case}_counts"]
    length = int(GOLDEN[f"{case}_len"])
    each = length // np.count_nonzero(np.bincount(labels)) + 1
    drawn = draws(labels, length, 31, 0)
    assert (labels[drawn] == np.unique(labels)[:, None]).all() and drawn.shape[1] == each
    ours = np.bincount(labels[balanced_order(labels, length, 31, 0)], minlength=len(golden))
    assert ours.sum() == golden.sum() == length
    cut = drawn.size - length
    for counts in (ours, golden):
        missing = np.where(np.bincount(labels, minlength=len(golden)) > 0, each - counts, 0)
        assert missing.min() >= 0 and missing.sum() == cut and (counts[missing == 0] <= each).all()


@pytest.mark.parametrize("case", CASES)
def test_published_mismatch_on_the_golden_draws(case: str) -> None:
    """The published draws visit these images of the reassigned dataset, with these labels."""
    labels, drawn = labels_of(case), GOLDEN[f"{case}_indices_legacy_numpy"]
    assert (np.bincount(labels[drawn], minlength=labels.max() + 1) == GOLDEN[f"{case}_counts"]).all()
    visited = as_published(drawn, labels)
    assert (visited == GOLDEN[f"{case}_reassigned_paths"][drawn]).all()
    renumbered = np.unique(labels, return_inverse=True)[1][visited]
    expected = GOLDEN[f"{case}_counts_as_published"]
    assert (np.bincount(renumbered, minlength=len(expected)) == expected).all()


def test_small_clusters_are_drawn_with_replacement_and_large_ones_without() -> None:
    labels = np.repeat([0, 1, 2, 4], [3, 6, 7, 60])
    drawn = draws(labels, 24, seed=1, epoch=0)  # seven of each cluster
    assert drawn.shape == (4, 7)
    assert len(set(drawn[3].tolist())) == 7, "a cluster of more than seven gives different images"
    repeats = [[len(set(row.tolist())) < 7 for row in draws(labels, 24, 1, epoch)] for epoch in range(20)]
    assert all(row[:2] == [True, True] and row[3] is False for row in repeats)
    assert sum(row[2] for row in repeats) > 15, "a cluster of seven is drawn with replacement"


def test_images_of_a_cluster_are_drawn_evenly_and_independently_of_order() -> None:
    labels = np.array([0] * 5 + [1] * 40)
    orders = [balanced_order(labels, 20, 7, epoch) for epoch in range(1500)]
    counts = np.bincount(np.concatenate(orders), minlength=45)
    assert stats.chisquare(counts[:5]).pvalue > 1e-4 and stats.chisquare(counts[5:]).pvalue > 1e-4
    of_place = np.stack(orders)[:, [0, 19]]
    share = (labels[of_place] == 0).mean(0)
    assert np.abs(share - 0.5).max() < 0.06, "shuffled: every place sees both clusters"


def test_is_a_function_of_seed_and_epoch() -> None:
    labels = labels_of("many")
    first = balanced_order(labels, 350, 31, 2)
    assert first.dtype == np.int64 and (balanced_order(labels.copy(), 350, 31, 2) == first).all()
    assert (balanced_order(labels, 350, 31, 3) != first).any() and (balanced_order(labels, 350, 32, 2) != first).any()


@pytest.mark.parametrize("length", [1, 3, 100, 500])
def test_any_length(length: int) -> None:
    order = balanced_order(labels_of("uneven"), length, 0, 0)
    assert order.shape == (length,) and order.min() >= 0 and order.max() < 200


def test_large_sets_take_seconds() -> None:
    labels = np.random.default_rng(0).integers(0, 10_000, 320_000)
    start = time.process_time()
    order = balanced_order(labels, 320_000, 31, 0)
    assert time.process_time() - start < 5
    counts = np.bincount(labels[order])
    assert counts.max() == 33 and counts.min() > 20
