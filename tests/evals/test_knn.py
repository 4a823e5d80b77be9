"""k-NN against the published numbers and a plain numpy version."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from clusterssl.evals.knn import check_flags, knn_accuracy
from clusterssl.evals.search import memory_mib

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "eval_metrics.npz"


def golden(case: str) -> tuple[dict, list[torch.Tensor], dict[int, list[float]]]:
    with np.load(GOLDEN) as arrays:
        params = json.loads(str(arrays[f"{case}_params"]))
        names = ("train", "train_labels", "test", "test_labels")
        data = [torch.from_numpy(arrays[f"{case}_{name}"]) for name in names]
        expected = {k: arrays[f"{case}_k{k}_top1_top5"].tolist() for k in params["k"]}
    return params, data, expected


@pytest.mark.parametrize("case", ["knn", "knn_tau"])
@pytest.mark.parametrize(("chunk", "bank_chunk"), [(1024, 65536), (16, 65536), (7, 33), (50, 1)])
def test_published_numbers_for_any_chunks(case: str, chunk: int, bank_chunk: int) -> None:
    params, data, expected = golden(case)
    found = knn_accuracy(*data, ks=params["k"], temperature=params["tau"], chunk=chunk, bank_chunk=bank_chunk)
    assert [found[k] for k in params["k"]] == [pytest.approx(expected[k]) for k in params["k"]]


def plain_knn(data: list[torch.Tensor], k: int, tau: float) -> float:
    """Top-1 by sorting all similarities."""
    train, train_labels, test, test_labels = (x.double().numpy() for x in data)
    train = train / np.linalg.norm(train, axis=1, keepdims=True)
    test = test / np.linalg.norm(test, axis=1, keepdims=True)
    right = 0
    for query, label in zip(test, test_labels, strict=True):
        similarity = train @ query
        nearest = np.argsort(-similarity)[:k]
        votes = np.bincount(train_labels[nearest].astype(int), np.exp(similarity[nearest] / tau), minlength=9)
        right += int(votes.argmax() == label)
    return 100 * right / len(test)


def random_data(scale: float = 3.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    centres = torch.randn(9, 6, generator=generator)
    labels = torch.randint(9, (400,), generator=generator)
    points = scale * (centres[labels] + torch.randn(400, 6, generator=generator))
    return [points[:300], labels[:300], points[300:], labels[300:]]


@pytest.mark.parametrize("k", [1, 13, 300])
def test_float32_rows_of_any_length_equal_the_plain_version(k: int) -> None:
    data = random_data()
    assert knn_accuracy(*data, ks=(k,), chunk=32, bank_chunk=77)[k][0] == pytest.approx(plain_knn(data, k, 0.1))


def test_tiny_temperature_does_not_overflow() -> None:
    data = random_data()
    cold = knn_accuracy(*data, ks=(20,), temperature=1e-4)[20]
    assert cold[0] == pytest.approx(knn_accuracy(*data, ks=(1,))[1][0])  # only the nearest has weight


def test_k_above_the_training_set_is_lowered_and_said(caplog: pytest.LogCaptureFixture) -> None:
    data = random_data()
    with caplog.at_level(logging.WARNING, "clusterssl"):
        found = knn_accuracy(*data, ks=(10, 5000, 7000))
    assert list(found) == [10, 300]
    assert "[5000, 7000] lowered to 300" in caplog.text


def test_memory_bound_grows_with_the_chunks_not_with_the_bank() -> None:
    small = memory_mib(10**5, 1000, 200, feature_dim=2048)
    assert memory_mib(10**7, 1000, 200, feature_dim=2048) == small
    assert memory_mib(10**7, 1000, 200, feature_dim=2048, bank_chunk=2**17) > small


def test_flags() -> None:
    assert check_flags((10,), 0.1) == ""
    assert "--nb_knn 0 5" in check_flags((0, 5), 0.1)
    assert "--temperature 0" in check_flags((5,), 0)
