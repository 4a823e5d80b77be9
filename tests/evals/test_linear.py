"""The probe in memory: exactness, draws, and that test images serve for nothing but the count."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from clusterssl.errors import UserError
from clusterssl.evals.linear import draw_labels, few_label_accuracy, probe_accuracy


def blobs(num: int, dim: int, seed: int = 0, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, dim))
    labels = np.arange(num) % classes
    return (centres[labels] + 1.5 * rng.normal(size=(num, dim))) * np.linspace(0.1, 30, dim), labels


@pytest.mark.parametrize("dim", [6, 300])
def test_fixed_penalty_equals_scikit_learn_on_all_columns(dim: int) -> None:
    (train, labels), (test, test_labels) = blobs(60, dim), blobs(200, dim, seed=1)
    mean, deviation = train.mean(0), train.std(0) * np.sqrt(dim)
    model = LogisticRegression(C=5.0, max_iter=5000, tol=1e-8).fit((train - mean) / deviation, labels)
    expected = 100 * model.score((test - mean) / deviation, test_labels)
    assert probe_accuracy(train, labels, test, test_labels, C=5.0) == pytest.approx(expected, abs=0.5)


def test_scale_of_columns_and_constant_columns_do_not_matter() -> None:
    (train, labels), (test, test_labels) = blobs(40, 10), blobs(100, 10, seed=1)
    scales = np.logspace(-3, 3, 10)
    plain = probe_accuracy(train, labels, test, test_labels)
    assert probe_accuracy(train * scales, labels, test * scales, test_labels) == pytest.approx(plain)
    padded = [np.hstack([x, np.full((len(x), 3), 7.0)]) for x in (train, test)]
    assert probe_accuracy(padded[0], labels, padded[1], test_labels) == pytest.approx(plain)


def test_a_test_image_is_judged_alone() -> None:
    """Neither the other test images nor their labels change a prediction."""
    (train, labels), (test, test_labels) = blobs(40, 10), blobs(12, 10, seed=1)
    single = [probe_accuracy(train, labels, test[i : i + 1], test_labels[i : i + 1], C=1.0) for i in range(12)]
    assert np.mean(single) == pytest.approx(probe_accuracy(train, labels, test, test_labels, C=1.0))
    assert 0 < np.mean(single) < 100


def test_the_penalty_is_chosen_without_the_test_images() -> None:
    (train, labels), (test, test_labels) = blobs(40, 10), blobs(200, 10, seed=1)
    chosen = probe_accuracy(train, labels, test, test_labels)
    fixed = [probe_accuracy(train, labels, test, test_labels, C=10.0**power) for power in range(-1, 5)]
    assert chosen in fixed and len(set(fixed)) > 2
    wrong = probe_accuracy(train, labels, test, (test_labels + 1) % 4)  # other test labels, the same predictions
    assert chosen + wrong <= 100


def test_statistics_come_from_the_unlabelled_images() -> None:
    (train, labels), (test, test_labels) = blobs(40, 10), blobs(300, 10, seed=1)
    shifted = blobs(400, 10, seed=2)[0] * np.logspace(-2, 2, 10)
    with_them = probe_accuracy(train, labels, test, test_labels, unlabelled_MF=shifted, C=1.0)
    assert with_them != probe_accuracy(train, labels, test, test_labels, C=1.0)


def test_separable_classes_are_learned_from_one_label_each() -> None:
    train, labels = blobs(80, 40)
    found = few_label_accuracy(train, labels, train, labels)
    assert len(found.each) == 3 and found.mean == pytest.approx(np.mean(found.each))
    clear = 100 * np.eye(4)[labels] + np.random.default_rng(0).normal(size=(80, 4))
    assert few_label_accuracy(clear, labels, clear, labels, labels_per_class=1).each == (100.0, 100.0, 100.0)


def test_draws_are_balanced_repeatable_and_differ() -> None:
    labels = np.random.default_rng(0).integers(5, size=300)
    draw = draw_labels(labels, 10, seed=1)
    assert np.bincount(labels[draw]).tolist() == [10] * 5
    assert len(set(draw.tolist())) == 50
    assert np.array_equal(draw, draw_labels(labels, 10, seed=1))
    assert not np.array_equal(draw, draw_labels(labels, 10, seed=1, draw=1))
    assert not np.array_equal(draw, draw_labels(labels, 10, seed=2))


def test_unlabelled_images_are_never_drawn() -> None:
    labels = np.array([-1] * 20 + [0] * 5 + [1] * 5)
    assert draw_labels(labels, 5, seed=0).tolist() == list(range(20, 30))


def test_too_few_images_of_a_class() -> None:
    with pytest.raises(UserError, match="--labels_per_class 10: class 1 has only 3"):
        draw_labels([0] * 20 + [1] * 3, 10, seed=0)
