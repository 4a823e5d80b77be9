"""The baselines are as strong as they claim, and the scores are scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from clusterssl.data import eval_batches, open_source
from clusterssl.evals.baselines import (
    Pixels,
    calibrate_batchnorm,
    draw_per_class,
    few_labels_accuracy,
    label_scores,
    unlabelled_scores,
)
from clusterssl.evals.comparison import difference, summary, with_spread
from clusterssl.evals.features import extract


def test_pixels_are_the_pixels() -> None:
    source = open_source("digits", split="val", limit=7)
    features, _ = extract(Pixels(), source, image_size=(32, 32))
    wanted = torch.stack([source.load(i).flatten().float() / 255 for i in range(7)])
    torch.testing.assert_close(features, wanted, atol=1e-6, rtol=0)


def test_calibration_sets_the_statistics_of_the_data_and_no_weight() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2))
    weights = [parameter.clone() for parameter in network.parameters()]
    x = torch.randn(3, 8, 3, 9, 9) * 3 + 1
    calibrate_batchnorm(network, x)
    norm = network[1]
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
    maps = network[0](x.flatten(0, 1)).detach()
    torch.testing.assert_close(norm.running_mean, maps.mean((0, 2, 3)))
    per_batch = maps.unflatten(0, (3, 8)).var((1, 3, 4)).mean(0)
    torch.testing.assert_close(norm.running_var, per_batch)
    assert not network.training and norm.momentum == 0.1
    assert all(torch.equal(a, b) for a, b in zip(weights, network.parameters(), strict=True))


def test_draws_are_balanced_and_differ_by_seed() -> None:
    labels = np.repeat(np.arange(5), 20)
    rows = draw_per_class(labels, 7, seed=3)
    assert len(set(rows.tolist())) == 35 and (np.bincount(labels[rows]) == 7).all()
    assert (rows == draw_per_class(labels, 7, seed=3)).all() and (rows != draw_per_class(labels, 7, seed=4)).any()


def test_few_labels_is_logistic_regression_on_standardised_features() -> None:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(3).repeat(40)
    features = torch.randn(120, 6, generator=generator) + 2.0 * nn.functional.one_hot(labels, 6)
    features *= torch.tensor([1e-3, 1.0, 50.0, 1.0, 7.0, 1.0])
    train, test = features[:60], features[60:]
    rows = draw_per_class(labels[:60].numpy(), 5, seed=2)
    a, b = ((part - train.mean(0)) / train.std(0, correction=0) for part in (train[rows], test))
    wanted = LogisticRegression(max_iter=1000).fit(a.numpy(), labels[rows].numpy()).predict(b.numpy())
    found = few_labels_accuracy(train, labels[:60], test, labels[60:], per_class=5, seed=2)
    assert found == pytest.approx(100 * (wanted == labels[60:].numpy()).mean())
    rescaled = few_labels_accuracy(train * 1000, labels[:60], test * 1000, labels[60:], per_class=5, seed=2)
    assert rescaled == pytest.approx(found), "the scale of a representation is no advantage"


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
