"""Positions: the same images in each global batch whatever the number of ranks."""

from __future__ import annotations

import numpy as np
import pytest

from clusterssl.data import PositionSampler, epoch_batches


def test_an_epoch_is_a_permutation_without_its_tail() -> None:
    batches = epoch_batches(103, 10, 31, 4)
    assert batches.shape == (10, 10) and batches.dtype == np.int64
    assert len(np.unique(batches)) == 100 and batches.min() >= 0 and batches.max() < 103
    np.testing.assert_array_equal(batches, epoch_batches(103, 10, 31, 4))
    assert (batches != epoch_batches(103, 10, 31, 5)).any() and (batches != epoch_batches(103, 10, 32, 4)).any()
    np.testing.assert_array_equal(epoch_batches(103, 20, 31, 4).ravel(), batches.ravel())


def rows_of_step(step: int, world_size: int, batch_size: int, accumulate: int, start: int = 0) -> list[tuple[int, int]]:
    """Keys of one optimizer step of all ranks together."""
    keys = []
    for rank in range(world_size):
        sampler = PositionSampler(100, batch_size, accumulate=accumulate, rank=rank, world_size=world_size, seed=31)
        sampler.epoch, sampler.start = 2, start
        micro = list(sampler)
        assert len(micro) == len(sampler) and all(len(m) == batch_size for m in micro)
        keys += [key for m in micro[step * accumulate : (step + 1) * accumulate] for key in m]
    return keys


@pytest.mark.parametrize(("world_size", "batch_size", "accumulate"), [(2, 6, 1), (3, 4, 1), (1, 3, 4), (2, 3, 2)])
def test_global_batches_do_not_depend_on_ranks_or_accumulation(
    world_size: int, batch_size: int, accumulate: int
) -> None:
    expected = rows_of_step(3, 1, 12, 1)
    assert rows_of_step(3, world_size, batch_size, accumulate) == expected
    assert rows_of_step(1, world_size, batch_size, accumulate, start=2) == expected
    assert [i for _, i in expected] == epoch_batches(100, 12, 31, 2)[3].tolist()
    assert {epoch for epoch, _ in expected} == {2}


def test_length() -> None:
    sampler = PositionSampler(100, 4, accumulate=2, world_size=3)
    assert sampler.global_batch == 24 and sampler.steps == 4 and len(sampler) == 8
    sampler.start = 3
    assert len(sampler) == 2 == len(list(sampler))
    sampler.start = 4
    assert len(sampler) == 0 == len(list(sampler))


def test_an_order_with_repeats_gives_every_occurrence_its_own_draws() -> None:
    order = np.array([3, 1, 3, 3, 0, 1, 2, 3, 1], dtype=np.int64)
    ranks = [PositionSampler(4, 2, rank=rank, world_size=2, images_per_epoch=9) for rank in range(2)]
    for sampler in ranks:
        sampler.epoch, sampler.order = 5, order
    assert [sampler.steps for sampler in ranks] == [2, 2]
    rows = [list(sampler) for sampler in ranks]
    keys = [key for step in zip(*rows, strict=True) for batch in step for key in batch]
    assert [position for _, position in keys] == order[:8].tolist()
    assert len(set(keys)) == 8
    assert keys[0] == (5, 3), "the first occurrence is drawn as in any epoch"
    ranks[1].start = 1
    assert list(ranks[1]) == rows[1][1:]
