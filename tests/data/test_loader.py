"""The loader: the same batches whatever the workers, ranks and restarts."""

from __future__ import annotations

import gc
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clusterssl.data import Batch, Loader, MultiCrop, eval_batches, open_source
from clusterssl.data.cache import Cache
from clusterssl.data.loader import signals_held
from clusterssl.data.pack import PackOptions, pack
from clusterssl.data.slots import Ticket
from clusterssl.errors import UserError

CROP = MultiCrop((2, 1), (32, 16), (0.3, 0.2), (1.0, 0.5))
SOURCE = open_source("digits", limit=100)


def steps(loader: Loader, epoch: int, start: int = 0) -> list[list[Batch]]:
    """All steps of an epoch."""
    return list(loader.epoch(epoch, start))


def assert_equal(a: list[list[Batch]], b: list[list[Batch]]) -> None:
    """The same batches in every bit."""
    assert len(a) == len(b) > 0
    for x, y in zip((m for step in a for m in step), (m for step in b for m in step), strict=True):
        assert all(torch.equal(c, d) for c, d in zip(x.crops, y.crops, strict=True))
        assert torch.equal(x.params, y.params) and torch.equal(x.index, y.index)


def test_workers_do_not_matter() -> None:
    alone = Loader(SOURCE, CROP, batch_size=8, seed=3)
    helped = Loader(SOURCE, CROP, batch_size=8, seed=3, workers=2)
    assert alone.batches_per_epoch == 12
    for epoch in (0, 1):
        assert_equal(steps(alone, epoch), steps(helped, epoch))
    assert not torch.equal(steps(alone, 0)[0][0].index, steps(alone, 1)[0][0].index)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_generator_is_left_alone(workers: int) -> None:
    state = torch.get_rng_state()
    loader = Loader(SOURCE, CROP, batch_size=50, workers=workers)
    steps(loader, 0)
    steps(loader, 1)
    assert len(list(eval_batches(SOURCE, image_size=32, workers=workers))) == 1
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_begins_anywhere(workers: int) -> None:
    loader = Loader(SOURCE, CROP, batch_size=4, accumulate=2, seed=3, workers=workers)
    whole = steps(loader, 5)
    assert len(whole) == 12 and all(len(step) == 2 for step in whole)
    assert_equal(steps(loader, 5, 9), whole[9:])
    assert steps(loader, 5, 12) == []


def test_an_abandoned_epoch_leaves_nothing_behind() -> None:
    loader = Loader(SOURCE, CROP, batch_size=8, seed=3, workers=2)
    whole = steps(loader, 1)
    for _ in loader.epoch(0):
        break
    assert_equal(steps(loader, 1), whole)


def test_ranks_share_the_batch_of_one() -> None:
    whole = steps(Loader(SOURCE, CROP, batch_size=12, seed=3), 0)
    parts = [steps(Loader(SOURCE, CROP, batch_size=4, seed=3, rank=r, world_size=3), 0) for r in range(3)]
    for i, (batch,) in enumerate(whole):
        for view in range(3):
            assert torch.equal(torch.cat([part[i][0].crops[view] for part in parts]), batch.crops[view])
        assert torch.equal(torch.cat([part[i][0].params for part in parts], dim=1), batch.params)
        assert torch.equal(torch.cat([part[i][0].index for part in parts]), batch.index)


def test_bad_numbers() -> None:
    with pytest.raises(UserError, match=r"global batch of 120 images \(30 x 2 .* 2 ranks\) .* dataset \(100 images\)"):
        Loader(SOURCE, CROP, batch_size=30, accumulate=2, world_size=2)
    for option in ("batch_size", "accumulate"):
        with pytest.raises(UserError, match=f"--{option} 0"):
            Loader(SOURCE, CROP, **{"batch_size": 4, option: 0})  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_workers_stay_one_line(workers: int, tmp_path: Path) -> None:
    for i in range(6):
        (tmp_path / f"{i}.jpg").write_bytes(b"")
    loader = Loader(open_source(str(tmp_path)), CROP, batch_size=2, workers=workers)
    with pytest.raises(UserError, match="6 unreadable images in a row") as caught:
        steps(loader, 0)
    assert "\n" not in str(caught.value)


def test_bad_images_come_with_the_batch(tree: Path) -> None:
    (tree / "cat" / "1.png").write_bytes(b"")
    loader = Loader(open_source(str(tree)), CROP, batch_size=12, workers=1)
    ((batch,),) = steps(loader, 0)
    assert [i for i, _ in batch.bad] == [1] and batch.bad[0][1] == "empty file"


def test_workers_ignore_the_signals_of_the_run() -> None:
    loader = Loader(SOURCE, CROP, batch_size=4, seed=3, workers=2)
    whole = steps(Loader(SOURCE, CROP, batch_size=4, seed=3), 0)
    batches = loader.epoch(0)
    seen = [next(batches)]
    workers = loader._loader._iterator._workers  # type: ignore[union-attr]
    for worker in workers:
        for name in ("INT", "TERM", "USR1", "USR2"):
            subprocess.run(["sh", "-c", f"kill -{name} {worker.pid}"], check=True)
    time.sleep(0.2)
    seen += list(batches)
    assert all(worker.is_alive() for worker in workers)
    assert_equal(seen, whole)
    workers[0].terminate()
    workers[0].join(5)
    assert not workers[0].is_alive(), "its parent must be able to end it"


def test_a_process_begun_while_signals_are_held_outlives_them() -> None:
    """A worker that has not reached its set-up yet has no other protection."""
    with signals_held():
        child = subprocess.Popen(["sh", "-c", "kill -TERM $$; echo alive"], stdout=subprocess.PIPE, text=True)
    assert child.communicate()[0] == "alive\n"
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, set())


def test_a_loader_that_dies_in_a_cycle_leaves_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its queues may be gone before the workers hear of the end; then only SIGTERM ends them."""
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.5)
    loader = Loader(SOURCE, CROP, batch_size=4, workers=1)
    batches = loader.epoch(0)
    next(batches)
    (worker,) = loader._loader._iterator._workers  # type: ignore[union-attr]
    cycle: list[object] = [loader, batches]
    cycle.append(cycle)
    del loader, batches, cycle
    gc.collect()
    worker.join(5)
    assert not worker.is_alive()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_batch_leaves_a_worker_in_one_piece_of_shared_memory(workers: int) -> None:
    crops = MultiCrop((2, 1, 1), (80, 24, 70), (0.3, 0.2, 0.1), (1.0, 0.5, 0.2))
    alone, helped = (Loader(open_source("synthetic:13:90x90"), crops, batch_size=5, workers=w) for w in (0, workers))
    for (a,), (b,) in zip(alone.epoch(1), helped.epoch(1), strict=True):
        assert len({view.untyped_storage().data_ptr() for view in b.crops}) == 1
        whole = torch.empty(0, dtype=torch.uint8).set_(b.crops[0].untyped_storage())
        assert isinstance(helped._slots.ticket(whole), Ticket)
        assert torch.equal(a.params, b.params) and torch.equal(a.index, b.index)
        for mine, theirs in zip(a.crops, b.crops, strict=True):
            assert torch.equal(mine, theirs) and mine.stride() == theirs.stride()


def test_the_knob_that_makes_loading_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    images, packed = tmp_path / "images", tmp_path / "packed"
    images.mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (120, 130, 3), dtype=np.uint8)).save(images / f"{i}.png")

    def told(data: str, workers: int, cache: Cache = "auto", side: int = 32) -> str:
        source = open_source(data, cache=cache)
        return Loader(source, MultiCrop((2,), (side,)), batch_size=2, workers=workers).faster()

    assert told(str(images), 3) == "raise --workers, now 3 on 8 cores"
    assert "clusterssl.data.pack SRC DST --short_side" in told(str(images), 8)
    assert "--nmb_crops" in told("synthetic:8:32x32", 8)
    pack(images, packed, PackOptions(workers=1))
    for cache in ("none", "ram", "disk"):
        assert "smaller, with --short_side 64 or so" in told(str(packed), 8, cache)
    assert "--nmb_crops" in told(str(packed), 8, side=224)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    assert "clusterssl.data.pack" in told(str(images), 2)
