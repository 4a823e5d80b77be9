"""Average precision against brute force over every threshold, scikit-learn and the golden vectors."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from clusterssl.evals.average_precision import RULES, average_precision, class_precisions, mean_precisions
from tests.golden_files import Golden

GOLDEN = Golden("eval_metrics")


def by_hand(positive: list[bool], score: list[float], rule: str) -> Fraction:
    """Exact fractions, one threshold after the other."""
    points = []
    for threshold in sorted(set(score), reverse=True):
        taken = [p for p, s in zip(positive, score, strict=True) if s >= threshold]
        points.append((Fraction(sum(taken), sum(positive)), Fraction(sum(taken), len(taken))))
    if rule == "11-point":
        return sum(max((p for r, p in points if r >= Fraction(t, 10)), default=Fraction()) for t in range(11)) / 11
    total, before = Fraction(), Fraction()
    for i, (recall, precision) in enumerate(points):
        height = max(p for _, p in points[i:]) if rule == "all-point" else precision
        total, before = total + (recall - before) * height, recall
    return total


@pytest.mark.parametrize("rule", RULES)
def test_equals_brute_force(rule: str) -> None:
    random = np.random.default_rng(0)
    for case in range(300):
        n = int(random.integers(1, 40))
        positive = random.random(n) < random.random()
        score = random.integers(0, 4 if case % 2 else 10**6, n).astype(float)  # with and without ties
        if positive.any():
            found = average_precision(positive, score, rule)
            assert found == pytest.approx(float(by_hand(positive.tolist(), score.tolist(), rule)), abs=1e-12)


def test_equals_scikit_learn() -> None:
    random = np.random.default_rng(1)
    for _ in range(50):
        positive, score = random.random(200) < 0.2, random.normal(size=200).round(1)
        assert average_precision(positive, score) == pytest.approx(average_precision_score(positive, score), abs=1e-12)


def test_known_lists() -> None:
    positive, score = [1, 0, 1, 0], [4.0, 3, 2, 1]
    assert average_precision(positive, score, "area") == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(positive, score, "11-point") == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
    assert average_precision([0, 1], [2.0, 1], "all-point") == 0.5
    for rule in RULES:
        assert average_precision([1, 1, 0], [3.0, 2, 1], rule) == 1
        assert np.isnan(average_precision([0, 0], [1.0, 2], rule))
    ten = [1] * 3 + [0] * 7 + [1] * 7  # recall 0.3 exactly, where 3 / 10 < 0.1 * 3 in floating point
    expected = (4 * 1 + 7 * Fraction(10, 17)) / 11
    assert average_precision(ten, -np.arange(17.0), "11-point") == pytest.approx(float(expected), abs=1e-12)


@pytest.mark.parametrize("case", ["voc_random", "voc_single_ties"])
def test_golden(case: str) -> None:
    labels, scores = GOLDEN[f"{case}_labels"], GOLDEN[f"{case}_scores"].sum(0)
    found = class_precisions(labels, scores)
    np.testing.assert_allclose(found, GOLDEN[f"{case}_ap"], atol=1e-5)
    assert found.mean() == pytest.approx(float(GOLDEN[f"{case}_map"]), abs=1e-5)
    assert mean_precisions(labels, scores)["map"] == pytest.approx(100 * found.mean())


def test_ties_count_against_and_ignored_labels_do_not_count() -> None:
    labels = np.array([[1], [0], [255], [1]], dtype=np.uint8)
    scores = np.array([[1.0], [1.0], [9.0], [0.0]])
    assert class_precisions(labels, scores)[0] == pytest.approx((1 / 2 + 2 / 3) / 2)
    without = mean_precisions(np.hstack([labels, np.zeros_like(labels)]), np.hstack([scores, scores]))
    assert without == pytest.approx(mean_precisions(labels, scores)), "a class without positives is left out"
