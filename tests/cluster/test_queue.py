from __future__ import annotations

import logging

import pytest
import torch

from clusterssl.cluster.online import AssignmentOptions, OnlineAssigner, usable_queue_length
from clusterssl.cluster.queue import FeatureQueue
from clusterssl.errors import UserError
from tests.ranks import run_ranks


def batches(count: int, size: int, dim: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.functional.normalize(torch.randn(2, size, dim, generator=generator), dim=2) for _ in range(count)]


def test_keeps_the_newest_batches_first_and_counts_until_full() -> None:
    queue = FeatureQueue(2, 9, 3, 4, torch.device("cpu"))
    pushed = batches(5, 3)
    for number, z in enumerate(pushed):
        assert queue.is_full(0) == (number >= 3)
        queue.push(0, z[0])
    assert torch.equal(queue.rows(0), torch.cat([pushed[4][0], pushed[3][0], pushed[2][0]]))
    assert not queue.is_full(1) and torch.equal(queue.rows(1), torch.zeros(9, 4))


def test_a_batch_of_zero_embeddings_fills_it_too() -> None:
    queue = FeatureQueue(1, 2, 2, 4, torch.device("cpu"))
    queue.push(0, torch.zeros(2, 4))
    assert queue.is_full(0)


def test_state_round_trip() -> None:
    queue = FeatureQueue(2, 6, 3, 4, torch.device("cpu"))
    for z in batches(2, 3):
        queue.push(0, z[0])
        queue.push(1, z[1])
    other = FeatureQueue(2, 6, 3, 4, torch.device("cpu"))
    other.load_state_dict(queue.state_dict())
    assert other.is_full(1) and torch.equal(other.rows(1), queue.rows(1))
    with pytest.raises(ValueError, match="queue of shape"):
        FeatureQueue(2, 9, 3, 4, torch.device("cpu")).load_state_dict(queue.state_dict())


def test_usable_length() -> None:
    assert usable_queue_length(100, 32) == 96 and usable_queue_length(96, 32) == 96 and usable_queue_length(0, 32) == 0
    with pytest.raises(UserError, match="--queue_length 31: shorter than a step of 32"):
        usable_queue_length(31, 32)


def test_says_what_length_is_used_instead(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "clusterssl"):
        OnlineAssigner(AssignmentOptions(queue_length=100), 1, 32)
    assert "--queue_length 100" in caplog.text and "using 96" in caplog.text


def assigned(rank: int, world_size: int, steps: int) -> tuple[list[torch.Tensor], dict]:
    prototypes = torch.nn.functional.normalize(torch.randn(7, 4, generator=torch.Generator().manual_seed(0)))
    options = AssignmentOptions(queue_length=24, epoch_queue_starts=0)
    assigner = OnlineAssigner(options, 2, 12 // world_size)
    assigner.begin_epoch(0, prototypes)
    mine = [z.chunk(world_size, dim=1)[rank] for z in batches(steps, 12)]
    return [assigner.assign(z, prototypes) for z in mine], assigner.state_dict()


def test_many_ranks_with_a_queue_equal_one() -> None:
    alone, alone_state = assigned(0, 1, 4)
    parts = run_ranks(assigned, 2, 4)
    for step, expected in enumerate(alone):
        together = torch.cat([part[0][step] for part in parts], dim=1)
        torch.testing.assert_close(together, expected, rtol=0, atol=1e-6)
    shards = torch.cat([part[1]["sharded"]["queue"] for part in parts])
    assert torch.equal(shards, alone_state["sharded"]["queue"]), "shards in rank order are the queue of one rank"


def test_hard_assignments_are_one_hot_at_the_largest_entry() -> None:
    z = batches(1, 12)[0]
    prototypes = torch.nn.functional.normalize(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)))
    soft = OnlineAssigner(AssignmentOptions(), 2, 12).assign(z, prototypes)
    hard = OnlineAssigner(AssignmentOptions(hard_assignment=True), 2, 12).assign(z, prototypes)
    assert torch.equal(hard.argmax(-1), soft.argmax(-1)) and torch.equal(hard.sum(-1), torch.ones(2, 12))
    assert set(hard.unique().tolist()) == {0.0, 1.0}
