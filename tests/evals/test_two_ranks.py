"""Everything distributed in the evaluations gives on two ranks what it gives on one; one pair of processes for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from clusterssl import dist
from clusterssl.data import open_source
from clusterssl.evals import features
from clusterssl.evals.classifier import LinearClassifier, epoch_order, evaluate_probes, steps_in_memory, train_epoch
from clusterssl.evals.features import augmented_steps, extract
from clusterssl.evals.knn import knn_accuracy
from tests.ranks import run_ranks

CPU = torch.device("cpu")


def points(num: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(3, (num,), generator=generator)
    centres = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    return centres[labels] + torch.randn(num, *shape, generator=generator, dtype=torch.float64), labels


def knn(queries: int) -> Any:
    x, y = points(300, 6)
    return knn_accuracy(x[100:], y[100:], x[:queries], y[:queries], ks=(5, 50), chunk=16, bank_chunk=64)


def training(step_images: int) -> Any:
    """BatchNorm and linear layer; 53 images are 6 steps of 8 and one of 5, or one of 52 and one of a single image."""
    x, y = points(53, 6, 2, 2)
    classifier = LinearClassifier((6, 2, 2), 3, use_bn=True, seed=2).double()
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.1, momentum=0.9)
    numbers = []
    start, stop = dist.share(53)
    for epoch in range(3):
        steps = steps_in_memory(x, y, epoch_order(53, 9, epoch), step_images // dist.size())
        numbers.append(train_epoch(classifier, optimizer, steps, CPU))
        numbers.append(
            evaluate_probes(classifier, zip(x[start:stop].split(10), y[start:stop].split(10), strict=True), CPU)[0]
        )
    state = [tensor.double().flatten() for tensor in classifier.state_dict().values()]
    return np.concatenate([np.asarray(numbers).ravel(), torch.cat(state).numpy()])


class Net(nn.Module):
    """A small network of fixed weights."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(5, 3, 3, 3, generator=generator), requires_grad=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.conv2d(images, self.weight).mean((2, 3))


def extracted(num: int) -> Any:
    features._ROWS_PER_EXCHANGE = 10  # several exchanges
    source = open_source(f"synthetic:{num}:16x16:3")
    x, y = extract(Net(), source, image_size=(16, 16), batch_size=8)
    own, own_labels = extract(Net(), source, image_size=(16, 16), batch_size=8, gather=False)
    assert len(own) == len(own_labels)
    counted = int(dist.all_reduce_(torch.tensor(len(own))))
    subset, _ = extract(Net(), source, image_size=(16, 16), batch_size=8, indices=np.array([4, 2]))
    return x.numpy(), y.numpy(), counted, subset.numpy()


def augmented(step_images: int) -> Any:
    """Features and labels of all steps of an epoch over 13 images, put together over the ranks."""
    source = open_source("synthetic:16:16x16:3")
    chosen = np.arange(3, 16)
    steps = augmented_steps(
        Net(), source, chosen, epoch_order(13, 5, 1), image_size=(16, 16), batch_size=step_images // dist.size(),
        workers=0, device=CPU, seed=5, epoch=1,
    )  # fmt: skip
    rows = [(dist.all_gather_cat(s.features), dist.all_gather_cat(s.labels), s.total) for s in steps]
    assert all(len(x) == len(y) == total for x, y, total in rows)
    return torch.cat([x for x, _, _ in rows]).numpy(), torch.cat([y for _, y, _ in rows]).numpy()


CASES: list[tuple[Callable[..., Any], int]] = [
    (knn, 100), (knn, 10), (training, 8), (training, 52), (extracted, 41), (extracted, 5), (augmented, 4),
    (augmented, 12),
]  # fmt: skip


def all_cases(rank: int, world_size: int) -> list[Any]:
    return [case(size) for case, size in CASES]


@pytest.fixture(scope="module")
def on_two_ranks() -> list[list[Any]]:
    return run_ranks(all_cases, 2)


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{case.__name__}-{size}" for case, size in CASES])
def test_two_ranks_equal_one(number: int, on_two_ranks: list[list[Any]]) -> None:
    case, size = CASES[number]
    alone = case(size)
    for found in on_two_ranks:
        if case is knn:
            assert found[number] == alone
        elif case is training:
            assert found[number] == pytest.approx(alone, abs=1e-9)
        else:
            for mine, expected in zip(found[number], alone, strict=True):
                assert np.asarray(mine) == pytest.approx(np.asarray(expected), abs=1e-6)
