"""Shared memory of the workers that is used again."""

from __future__ import annotations

import gc
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor

from clusterssl.data import Batch, Loader, MultiCrop, open_source
from clusterssl.data.slots import Slots

CROP = MultiCrop((2, 1), (32, 16), (0.3, 0.2), (1.0, 0.5))
SOURCE = open_source("digits", limit=96)


class Worker:
    """What torch tells a worker about itself."""

    id = 1


@pytest.fixture
def slots(monkeypatch: pytest.MonkeyPatch) -> Slots:
    """Two slots for each of two workers, seen from the second."""
    monkeypatch.setattr("clusterssl.data.slots.get_worker_info", Worker)
    found = Slots(2, 2, 5000)
    found.renew()
    return found


def sent(slots: Slots, buffer: Tensor) -> Tensor:
    return pickle.loads(pickle.dumps(slots.ticket(buffer)))


def test_a_slot_is_free_when_its_last_tensor_is_gone(slots: Slots) -> None:
    first, second = slots.take(5000), slots.take(10)
    assert first is not None and second is not None and slots.take(1) is None
    first.fill_(7)
    second.fill_(9)
    arrived, other = sent(slots, first), sent(slots, second)
    assert arrived.data_ptr() == first.data_ptr() and len(arrived) == 5000 and len(other) == 10
    view = arrived[100:200].view(10, 10)
    del arrived
    gc.collect()
    assert slots.take(1) is None and (view == 7).all() and (other == 9).all()
    del view
    gc.collect()
    again = slots.take(1)
    assert again is not None and again.data_ptr() == first.data_ptr() and slots.take(1) is None


def test_other_tensors_travel_as_they_are(slots: Slots) -> None:
    assert slots.take(10**6) is None
    own = torch.arange(9, dtype=torch.uint8)
    assert slots.ticket(own) is own
    assert pickle.loads(pickle.dumps(slots)).take(1) is None


def held(batches: list[Batch]) -> list[Tensor]:
    return [crop for batch in batches for crop in batch.crops]


@pytest.mark.parametrize("persistent", [True, False])
def test_batches_that_are_kept_are_not_written_over(persistent: bool) -> None:
    expected = held([step[0] for step in Loader(SOURCE, CROP, batch_size=4).epoch(0)])
    loader = Loader(SOURCE, CROP, batch_size=4, workers=2, persistent=persistent)
    for _ in range(3):
        kept = held([step[0] for step in loader.epoch(0)])
        assert all(torch.equal(a, b) for a, b in zip(kept, expected, strict=True))
        for _ in loader.epoch(1):
            break  # what was under way is dropped
        assert all(torch.equal(a, b) for a, b in zip(kept, expected, strict=True))


@pytest.mark.parametrize("persistent", [True, False])
def test_memory_is_used_again_also_after_abandoned_epochs(persistent: bool) -> None:
    loader = Loader(SOURCE, CROP, batch_size=4, workers=2, persistent=persistent)
    for epoch in range(6):
        for _ in loader.epoch(epoch):
            break
    block = loader._slots.memory
    places = set()
    for step in loader.epoch(9):
        block = loader._slots.memory
        assert block is not None
        first = block.bytes_of(0, 1).ctypes.data
        places.add((step[0].crops[0].data_ptr() - first) // block.stride)
    assert block is not None and places <= set(range(len(block.taken))) and 2 <= len(places) < 24
    del step, _
    gc.collect()
    assert np.count_nonzero(block.taken) == 0


def test_an_epoch_goes_on_after_another_was_begun() -> None:
    loader = Loader(SOURCE, CROP, batch_size=4, workers=1, persistent=False)
    expected = held([step[0] for step in loader.epoch(0)])
    first = loader.epoch(0)
    begun = [next(first)[0]]
    next(loader.epoch(1))
    ours = held(begun + [step[0] for step in first])
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
