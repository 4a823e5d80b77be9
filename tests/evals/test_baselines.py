"""The baselines are as strong as they claim, and a summary never flatters the gain."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from clusterssl.data import eval_batches, open_source
from clusterssl.evals.baselines import Pixels, label_scores, unlabelled_scores
from clusterssl.evals.comparison import difference, summary, with_spread
from clusterssl.evals.features import extract


def test_pixels_are_the_pixels() -> None:
    source = open_source("digits", split="val", limit=7)
    features, _ = extract(Pixels(), source, image_size=(32, 32))
    wanted = torch.stack([source.load(i).flatten().float() / 255 for i in range(7)])
    torch.testing.assert_close(features, wanted, atol=1e-6, rtol=0)


def test_separable_features_score_full_marks_and_noise_chance() -> None:
    labels = torch.arange(10).repeat(30)
    clean = nn.functional.one_hot(labels, 16).float() + 0.01 * torch.rand(300, 16)
    noise = torch.randn(300, 16)
    good = label_scores(clean, labels, clean, labels, seed=1) | unlabelled_scores(clean, labels, seed=1)
    assert all(value == pytest.approx(100) for value in good.values()), good
    bad = label_scores(noise[:150], labels[:150], noise[150:], labels[150:], seed=1)
    assert max(bad.values()) < 30 and unlabelled_scores(noise, labels, seed=1)["nmi"] < 30


def test_summary_takes_the_strongest_untrained_reading_of_each_measure() -> None:
    fixed = {"pixels": {"a": 1.0, "b": 2.0}, "x": {"a": 5.0, "b": 0.0}, "pretrained": {"a": 8.0, "b": 8.0}}
    found = [{**fixed, "y": {"a": 9.0, "b": 1.0}}, {**fixed, "y": {"a": 0.0, "b": 2.0}}]
    rows = summary(found)
    assert rows["untrained"] == {"a": [5.0, 5.0], "b": [1.0, 2.0]}
    assert rows["pretrained"] == {"a": [8, 8], "b": [8, 8]} and list(rows) == ["raw pixels", "untrained", "pretrained"]


def test_words() -> None:
    assert with_spread([1.0, 3.0]) == "2.0 ± 1.4" and with_spread([4.04]) == "4.0"
    assert difference(-2.04) == "2.0 points below" and difference(6.5) == "6.5 points above"


def test_digits_pixels_are_as_strong_as_known() -> None:
    train, val = (open_source("digits", split=split) for split in ("train", "val"))
    batches = list(eval_batches(val, image_size=(32, 32), batch_size=100))
    assert sum(len(batch.images) for batch in batches) == 300
    a, b = (extract(Pixels(), source, image_size=(32, 32)) for source in (train, val))
    scores = label_scores(*a, *b, seed=1, draws=1)
    assert scores["knn"] > 94 and 80 < scores["few"] < 95
