"""Datasets on the training device: the batches of the other paths, in every bit."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from clusterssl import room
from clusterssl.data import Batch, Loader, MultiCrop, Resident, Source, open_source, reside
from clusterssl.data import resident as module
from clusterssl.errors import UserError
from tests.ranks import run_ranks

CROP = MultiCrop((2, 1), (24, (12, 30)), (0.3, 0.1), (1.0, 0.5))
CPU = torch.device("cpu")
Held = Callable[..., Resident]


@pytest.fixture(params=["whole batches", "image by image"])
def held(request: pytest.FixtureRequest) -> Held:
    """Holds a source; its crops are cut as on a GPU, or as on a CPU."""

    def hold(source: Source, workers: int = 0) -> Resident:
        there = reside(source, CPU, workers)
        assert not there.whole_batches
        there.whole_batches = request.param == "whole batches"
        return there

    return hold


def batches(loader: Loader, epoch: int, start: int = 0, order: np.ndarray | None = None) -> list[Batch]:
    return [batch for step in loader.epoch(epoch, start, order) for batch in step]


def assert_same(ours: list[Batch], expected: list[Batch]) -> None:
    assert len(ours) == len(expected) > 0
    for a, b in zip(ours, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.crops, b.crops, strict=True))
        assert torch.equal(a.params, b.params) and torch.equal(a.index, b.index) and a.bad == b.bad


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_folder(held: Held, workers: int, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE_BYTES", 10_000)
    for number in (1, 2):
        (tree / "dog" / "small" / f"{number}.png").write_bytes(b"broken")
    plain = open_source(str(tree), cache="none")
    source = open_source(str(tree), cache="device")
    there = held(source, workers)
    loaders = [Loader(plain, CROP, batch_size=4, seed=3), Loader(source, CROP, batch_size=4, seed=3, resident=there)]
    order = np.array([5, 5, 0, 6, 11, 5, 1, 0, 2, 2, 3, 9])
    expected = [batches(loaders[0], 0), batches(loaders[0], 7, 1), batches(loaders[0], 2, order=order)]
    assert any(batch.bad for batch in expected[0])
    shutil.rmtree(tree)
    assert_same(batches(loaders[1], 0), expected[0])
    assert_same(batches(loaders[1], 7, 1), expected[1])
    assert_same(batches(loaders[1].another(), 2, order=order), expected[2])


@pytest.mark.parametrize("data", ["digits", "synthetic:40:20x31"])
def test_built_in_images_and_small_ones(held: Held, data: str) -> None:
    source = open_source(data, limit=40)
    crop = MultiCrop((2, 2), (32, 24), (0.3, 0.1), (1.0, 0.5))
    expected = batches(Loader(source, crop, batch_size=10, accumulate=2, seed=1), 3)
    there = held(source)
    assert_same(batches(Loader(source, crop, batch_size=10, accumulate=2, seed=1, resident=there), 3), expected)


def test_an_epoch_begins_anywhere_and_ranks_share_it(held: Held) -> None:
    source = open_source("synthetic:50:70x31")
    there = held(source)
    whole = batches(Loader(source, CROP, batch_size=8, seed=3, resident=there), 5)
    assert_same(batches(Loader(source, CROP, batch_size=8, seed=3, resident=there), 5, 4), whole[4:])
    parts = [
        batches(Loader(source, CROP, batch_size=4, rank=rank, world_size=2, seed=3, resident=there), 5)
        for rank in range(2)
    ]
    for batch, first, second in zip(whole, *parts, strict=True):
        assert torch.equal(batch.index, torch.cat([first.index, second.index]))
        for view in range(CROP.num_views):
            assert torch.equal(batch.crops[view], torch.cat([first.crops[view], second.crops[view]]))


def test_the_global_generator_is_left_alone(held: Held) -> None:
    state = torch.get_rng_state()
    source = open_source("digits", limit=20)
    batches(Loader(source, CROP, batch_size=10, resident=held(source)), 0)
    assert torch.equal(state, torch.get_rng_state())


def test_too_little_room_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "usable_bytes", lambda device: 2 * 3 * 32 * 32 * 100)
    reside(open_source("digits", limit=100), CPU)
    monkeypatch.setattr(module, "_PIECE_BYTES", 3 * 32 * 32 * 64)
    with pytest.raises(UserError, match=r"--cache device: 128 of 200 images .* of what is free on cpu") as told:
        reside(open_source("digits", limit=200), CPU)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_pieces_are_bounded_by_bytes_and_take_no_shared_memory(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    image = 3 * 32 * 32
    monkeypatch.setattr(module, "_PIECE_BYTES", 7 * image)
    monkeypatch.setattr(module, "_PIECE_IMAGES", 100)
    source = open_source("digits", limit=40)
    pieces = list(module._pieces(source, workers))
    assert [piece.flat_P3.nbytes // image for piece in pieces] == ([7] * 4 + [6] * 2 if workers else [7] * 5 + [5])
    assert all(type(piece.flat_P3) is np.ndarray for piece in pieces)  # tensors of workers would lie in /dev/shm
    assert sorted(i for piece in pieces for i in piece.positions) == list(range(40))
    monkeypatch.setattr(module, "_PIECE_IMAGES", 3)
    assert all(len(piece.positions) <= 3 for piece in module._pieces(source, workers))


def test_no_piece_stays_in_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays: list[weakref.ref[np.ndarray]] = []
    alive: list[int] = []
    original = module._pieces

    def watched(source: Source, workers: int) -> Iterator[module._Piece]:
        for piece in original(source, workers):
            arrays.append(weakref.ref(piece.flat_P3))
            yield piece
            del piece
            alive.append(sum(array() is not None for array in arrays))

    monkeypatch.setattr(module, "_pieces", watched)
    monkeypatch.setattr(module, "_PIECE_BYTES", 3 * 32 * 32 * 10)
    there = reside(open_source("digits", limit=100), torch.device("meta"))  # which keeps no bytes
    assert there.pixels.flat_P3.shape == (100 * 32 * 32, 3)
    assert len(alive) == 10 and max(alive) <= 1


def test_workers_that_hold_too_much_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "free_bytes", lambda: 8 * 225 * 3 * 32 * 32 / room.USABLE["cpu"])
    monkeypatch.setattr(module, "_PIECE_IMAGES", 25)
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 8, "LOCAL_WORLD_SIZE": 8}.items():
        monkeypatch.setenv(name, str(value))
    source = open_source("digits", limit=100)
    for workers in (0, 1):
        reside(source, CPU, workers)
    with pytest.raises(UserError, match=r"--cache device: 2 --workers of each of 8 ranks .* lower --workers"):
        reside(source, CPU, workers=2)


def test_a_device_that_is_full_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module, "_pieces", full)
    with pytest.raises(UserError, match=r"--cache device: the memory of cpu ran out .* leave --cache out"):
        reside(open_source("digits", limit=10), CPU)


def test_no_readable_image_is_refused(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"broken")
    with pytest.raises(UserError, match="unreadable images in a row"):
        reside(open_source(str(tmp_path)), CPU)


def crowded(rank: int, world_size: int) -> str:
    """One rank's device has no room."""
    if rank == 1:
        module.usable_bytes = lambda device: 1000.0  # type: ignore[assignment]
    try:
        reside(open_source("digits", limit=10), CPU)
    except UserError as error:
        return str(error)
    return ""


def test_a_rank_without_room_ends_all() -> None:
    first, second = run_ranks(crowded, 2)
    assert "another rank stopped" in first and "--cache device" in second


@pytest.mark.gpu
def test_batches_on_a_gpu_are_those_of_the_folder(tree: Path) -> None:
    source = open_source(str(tree))
    there = reside(source, torch.device("cuda"))
    ours = batches(Loader(source, CROP, batch_size=4, seed=3, resident=there), 0)
    assert all(crop.is_cuda for batch in ours for crop in batch.crops)
    here = [batch._replace(crops=[crop.cpu() for crop in batch.crops]) for batch in ours]
    assert_same(here, batches(Loader(source, CROP, batch_size=4, seed=3), 0))
