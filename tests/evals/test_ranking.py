"""Scores of ranked lists: cases by hand, a second implementation, and chance on the real ground truth."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from clusterssl.evals.groundtruth import GroundTruth, Query, read_ground_truth
from clusterssl.evals.ranking import evaluate, places_of, precision_at, trapezoid_precision
from tests.evals.voc import unpacked


def by_program(order: list[int], positive: set[int], junk: set[int]) -> Fraction:
    """The rule of the Oxford program, one image after the other."""
    recall, precision, area, seen, hits = Fraction(0), Fraction(1), Fraction(0), 0, 0
    for image in order:
        if image in junk:
            continue
        hits += image in positive
        seen += 1
        new_recall, new_precision = Fraction(hits, len(positive)), Fraction(hits, seen)
        area += (new_recall - recall) * (precision + new_precision) / 2
        recall, precision = new_recall, new_precision
    return area


def test_by_hand() -> None:
    order = np.array([3, 0, 1, 2, 4])
    places = places_of(order, np.array([0, 2]), np.array([1]))  # list without junk: 3, 0, 2, 4
    assert places.tolist() == [1, 2]
    assert trapezoid_precision(places) == pytest.approx(((0 + 1 / 2) / 2 + (1 / 2 + 2 / 3) / 2) / 2)
    assert trapezoid_precision(np.array([0, 1, 2])) == 1
    assert trapezoid_precision(np.array([0, 3])) == pytest.approx((1 + (1 / 3 + 2 / 4) / 2) / 2)
    assert [precision_at(places, k) for k in (1, 2, 3, 10)] == [0, 1 / 2, 2 / 3, 2 / 3]
    assert precision_at(np.array([0]), 10) == 1, "no more positives to be found"
    assert np.isnan(trapezoid_precision(np.array([], dtype=int))) and np.isnan(precision_at(np.array([], dtype=int), 1))


def test_equals_the_program() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        n = int(random.integers(2, 30))
        kind = random.integers(0, 3, n)
        kind[random.integers(n)] = 1
        positive, junk = np.flatnonzero(kind == 1), np.flatnonzero(kind == 2)
        order = random.permutation(n)
        expected = by_program(order.tolist(), set(positive.tolist()), set(junk.tolist()))
        assert trapezoid_precision(places_of(order, positive, junk)) == pytest.approx(float(expected), abs=1e-12)


def test_levels_and_means() -> None:
    queries = [
        Query("p", None, {"easy": (0,), "hard": (1,), "junk": (2,)}),
        Query("q", None, {"easy": (), "hard": (3,), "junk": ()}),
    ]
    truth = GroundTruth(list("abcd"), queries, "revisited")
    found = evaluate(np.array([[2, 0, 1, 3], [0, 3, 1, 2]]), truth, ks=(1, 2))
    assert found["map_easy"] == 100, "the second query has no easy image and does not count"
    assert found["map_medium"] == pytest.approx(100 * (1 + 1 / 4) / 2)
    assert found["map_hard"] == pytest.approx(100 * (1 + 1 / 4) / 2)
    assert found["mp1_medium"] == 50 and found["mp2_medium"] == pytest.approx(100 * (1 + 1 / 2) / 2)
    original = GroundTruth(list("abcd"), [Query("p", None, {"ok": (0,), "junk": (2,)})], "original")
    assert evaluate(np.array([[2, 0, 1, 3]]), original, ks=(1,)) == {"map": 100.0, "mp1": 100.0}


def test_chance_on_the_real_ground_truth(tmp_path: Path) -> None:
    truth = read_ground_truth(unpacked("retrieval", tmp_path) / "roxford5k" / "gnd_roxford5k.pkl")
    random = np.random.default_rng(0)
    order = np.stack([random.permutation(len(truth.names)) for _ in truth.queries])
    found = evaluate(order, truth)
    for level in ("easy", "medium", "hard"):
        shares = [len(p) / (len(truth.names) - len(s)) for p, s in truth.positives(level) if len(p)]
        chance = 100 * float(np.mean(shares))
        assert 0.5 * chance < found[f"map_{level}"] < 2.5 * chance, level
        assert found[f"map_{level}"] < 5
    perfect = np.stack([np.r_[p, np.setdiff1d(np.arange(len(truth.names)), p)] for p, _ in truth.positives("medium")])
    assert evaluate(perfect, truth)["map_medium"] == 100 == evaluate(perfect, truth)["mp10_medium"]
