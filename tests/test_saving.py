"""Saves behind training's back: complete or absent, in all ranks alike, whatever fails or is killed meanwhile."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from clusterssl import dist, files, pulse, saving
from clusterssl.dist import World
from clusterssl.errors import UserError
from clusterssl.run import Run
from tests.ranks import run_ranks

SHARED, PREVIOUS = "checkpoint.pth.tar", "checkpoint.previous.pth.tar"


def path_of(descriptor: int) -> str:
    return str(Path(f"/proc/self/fd/{descriptor}").readlink())


def held_up(monkeypatch: pytest.MonkeyPatch | None, gate: threading.Event, *, only: str = "") -> None:
    """Let writing of files whose name contains `only` wait for a gate, as a slow disk would."""
    real = os.fsync

    def slow(descriptor: int) -> None:
        if only in path_of(descriptor):
            gate.wait(60)
        real(descriptor)

    (monkeypatch or pytest.MonkeyPatch()).setattr(files.os, "fsync", slow)


def values(folder: Path, name: str = SHARED) -> tuple[int, float]:
    state = files.read_checkpoint(folder / name)
    return state["step"], float(state["weight"][0])


def test_training_goes_on_while_a_save_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, weight, gate = Run(tmp_path, World()), torch.full((1000,), 3.0), threading.Event()
    run.save({"weight": weight}, {"rows": weight}, step=3)
    held_up(monkeypatch, gate)
    at = pulse.last()
    weight.fill_(4.0)
    run.saver.begin({"weight": weight}, {"rows": weight}, step=4)
    weight.fill_(5.0)
    assert run.saver.busy and not run.saver.failed
    assert values(tmp_path) == (3, 3.0), "it counts only when it is complete"
    gate.set()
    while run.saver.busy:
        time.sleep(0.01)
    assert pulse.last() == at, "writing is no sign of life of training"
    run.saver.finish()
    assert pulse.last()[1] == "waiting for the checkpoint of step 4"
    assert not run.saver.busy and values(tmp_path) == (4, 4.0) and values(tmp_path, PREVIOUS) == (3, 3.0)
    loaded = Run(tmp_path, World()).load()
    assert loaded is not None and loaded["sharded"]["rows"][0] == 4.0


def test_one_save_at_a_time_and_nothing_is_left_over(tmp_path: Path) -> None:
    run = Run(tmp_path, World())
    for step in range(1, 6):
        rows = torch.full((10,), float(step))
        run.saver.begin({"weight": rows}, {"rows": rows}, step=step, keep_as=f"ckp-{step}.pth" if step == 2 else "")
    run.close()
    assert values(tmp_path) == (5, 5.0) and values(tmp_path, PREVIOUS) == (4, 4.0)
    assert values(tmp_path / "checkpoints", "ckp-2.pth") == (2, 2.0)
    shards = {path.name for path in tmp_path.glob("checkpoint.step*")}
    assert shards == {f"checkpoint.step{step}.rank0-of-1.pth" for step in (4, 5)}
    assert not list(tmp_path.rglob("*.tmp"))


def full_disk(part: str) -> None:
    def write(descriptor: int) -> None:
        if part in path_of(descriptor):
            raise OSError(errno.ENOSPC, "No space left on device")

    pytest.MonkeyPatch().setattr(files.os, "fsync", write)


def fail(rank: int, world_size: int, folder: str, part: str, faulty: int) -> tuple[bool, str, int]:
    run = Run(folder, World(rank, world_size))
    rows = torch.full((6,), 1.0)
    run.save({"weight": rows}, {"rows": rows}, step=1)
    if rank == faulty:
        full_disk(part)
    run.saver.begin({"weight": rows + 1}, {"rows": rows + 1}, step=2)
    end = time.monotonic() + 30
    failed = False
    while not failed and time.monotonic() < end:
        failed = bool(dist.all_reduce_(torch.tensor(int(run.saver.failed)), "max"))
    try:
        run.saver.finish()
    except UserError as error:
        state = Run(folder, World(rank, world_size)).load()
        assert state is not None and state["sharded"]["rows"].tolist() == [1.0] * 6
        return failed, str(error), state["step"]
    return failed, "", -1


@pytest.mark.parametrize(("part", "faulty"), [("rank1-of-2", 1), ("rank0-of-2", 0), ("checkpoint.pth.tar", 0)])
def test_a_full_disk_is_told_by_all_ranks_and_the_checkpoint_before_is_intact(
    part: str, faulty: int, tmp_path: Path
) -> None:
    answers = run_ranks(fail, 2, str(tmp_path), part, faulty)
    assert answers[0] == answers[1]
    failed, message, step = answers[0]
    assert failed and step == 1
    assert part in message and "No space left on device" in message and "\n" not in message
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_vanished_folder_is_bad_input(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", World())
    run.saver.begin({"weight": torch.ones(3)}, {}, step=1)
    with pytest.raises(UserError, match=r"could not be written \(.*No such file"):
        run.saver.finish()
    run.saver.finish()  # said once


def test_a_defect_stays_a_defect(tmp_path: Path) -> None:
    run = Run(tmp_path, World())
    run.saver.begin({"weight": threading.Lock()}, {}, step=1, copy=False)
    with pytest.raises(TypeError, match="pickle"):
        run.saver.finish()


def slow_rank(rank: int, world_size: int, folder: str) -> tuple[bool, bool]:
    """Rank 1 writes slowly: is the shared file there before, and after?"""
    run, gate = Run(folder, World(rank, world_size)), threading.Event()
    if rank == 1:
        held_up(None, gate, only="rank1")
    run.saver.begin({"weight": torch.ones(3)}, {"rows": torch.ones(3)}, step=1)
    time.sleep(0.3)
    dist.barrier()
    before = Path(folder, SHARED).exists()
    dist.barrier()
    gate.set()
    run.saver.finish()
    return before, Path(folder, SHARED).exists()


def test_the_shared_file_comes_when_all_ranks_have_written(tmp_path: Path) -> None:
    """Also where an interrupted save has left shards of the same step."""
    for rank in range(2):
        files.save_checkpoint({"rows": torch.zeros(3)}, tmp_path / f"checkpoint.step1.rank{rank}-of-2.pth")
    assert run_ranks(slow_rank, 2, str(tmp_path)) == [(False, True), (False, True)]


def commits_alone(rank: int, world_size: int, folder: str) -> float:
    """Training hears nothing of the save and calls no collective meanwhile."""
    run = Run(folder, World(rank, world_size))
    run.saver.begin({"weight": torch.ones(3)}, {"rows": torch.ones(3)}, step=1)
    end = time.monotonic() + 30
    while not Path(folder, SHARED).exists() and time.monotonic() < end:
        time.sleep(0.01)
    return values(Path(folder))[1]


def test_a_save_becomes_complete_during_a_long_step(tmp_path: Path) -> None:
    assert run_ranks(commits_alone, 2, str(tmp_path)) == [1.0, 1.0]


def lonely(rank: int, world_size: int, folder: str) -> float:
    """Rank 1 never saves; how long does rank 0 wait at its end?"""
    run, saving._PATIENCE_S = Run(folder, World(rank, world_size)), 0.5
    if rank == 1:
        return 0.0
    run.saver.begin({"weight": torch.ones(3)}, {}, step=1)
    began = time.monotonic()
    run.close()
    return time.monotonic() - began


def test_the_end_of_a_run_waits_a_bounded_time_for_lost_ranks(tmp_path: Path) -> None:
    assert 0.4 < run_ranks(lonely, 2, str(tmp_path))[0] < 20
    assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_does_not_take_the_place_of_the_previous_one(tmp_path: Path) -> None:
    run = Run(tmp_path, World())
    for step in (1, 2):
        run.save({"weight": torch.full((3,), float(step))}, {}, step=step)
    (tmp_path / SHARED).unlink()
    (tmp_path / SHARED).write_bytes(b"torn")
    again = Run(tmp_path, World())
    state: Any = again.load()
    assert state["step"] == 1
    again.save({"weight": torch.full((3,), 2.0)}, {}, step=2)
    assert values(tmp_path) == (2, 2.0) and values(tmp_path, PREVIOUS) == (1, 1.0)
    again.save({"weight": torch.full((3,), 3.0)}, {}, step=3)
    assert values(tmp_path, PREVIOUS) == (2, 2.0)


def rehearsed(rank: int, world_size: int, folder: str) -> float:
    saver = Run(folder, World(rank, world_size)).saver
    return saver.rehearse({"weight": torch.ones(100_000)}, {"rows": torch.ones(100_000)})


def test_a_rehearsal_leaves_nothing_and_takes_the_same_time_everywhere(tmp_path: Path) -> None:
    first, second = run_ranks(rehearsed, 2, str(tmp_path))
    assert first == second > 0 and not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="could not be written"):
        Run(tmp_path / "absent", World()).saver.rehearse({"weight": torch.ones(1)}, {})
