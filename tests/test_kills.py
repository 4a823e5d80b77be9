"""Runs that are killed or signalled while a checkpoint is being written in the background."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from clusterssl.files import read_checkpoint
from tests.launch import ROOT, TINY, Launched, metrics, wait_for_step

FLAGS = [*TINY, "--batch_size", "8", "--queue_length", "32", "--epoch_queue_starts", "1", "--epochs", "12"]
OFTEN = ["--checkpoint_minutes", "1e-6"]
"""in the background, at every step at which no other save is under way"""
STEPS = 72


def start(folder: Path, *flags: str, fsync_s: float = 0.03, full_after: int = 10**6) -> Launched:
    words = [str(fsync_s), str(full_after), str(ROOT / "main_swav.py"), *FLAGS, *flags, "--dump_path", str(folder)]
    return Launched("tests/slow_disk.py", *words, ranks=2)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Weights of the run that nobody disturbed and that saved at its epochs' ends only."""
    folder = tmp_path_factory.mktemp("whole")
    codes, printed = Launched("main_swav.py", *FLAGS, "--dump_path", str(folder), ranks=2).wait()
    assert codes == [0, 0], printed
    return read_checkpoint(folder / "checkpoint.pth.tar")["state_dict"]


def assert_ends_equal(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    codes, printed = Launched("main_swav.py", *FLAGS, "--dump_path", str(folder), ranks=2).wait()
    assert codes == [0, 0], printed
    state = read_checkpoint(folder / "checkpoint.pth.tar")
    assert state["step"] == STEPS
    assert all(torch.equal(state["state_dict"][name], value) for name, value in expected.items())
    assert not list(folder.rglob("*.tmp"))
    steps = {int(path.name.split(".")[1][4:]) for path in folder.glob("checkpoint.step*")}
    assert len(steps) == 2 and STEPS in steps, "shards of interrupted saves are gone"


def unfinished(folder: Path) -> set[str]:
    """Checkpoint files that are being written, or were when their writer was killed."""
    return {f"{path.name} {path.stat().st_ino}" for path in folder.glob(".checkpoint*.tmp") if path.exists()}


def wait_for_writing(folder: Path, before: set[str], launched: Launched) -> set[str]:
    """Return as soon as another file is being written, or the run has ended."""
    end = time.monotonic() + 240
    while time.monotonic() < end and launched.processes[0].poll() is None:
        with contextlib.suppress(OSError):  # one was finished between two looks
            if new := unfinished(folder) - before:
                return new
        time.sleep(0.002)
    return set()


def test_killed_while_saving_ends_with_the_same_weights(tmp_path: Path, expected: dict[str, torch.Tensor]) -> None:
    seed = int.from_bytes(os.urandom(4), "big")
    chance, interrupted = random.Random(seed), 0
    print(f"random seed {seed}")
    for number in (2, 1, 3, 2, 1):
        before = unfinished(tmp_path)
        launched = start(tmp_path, *OFTEN, fsync_s=0.06)
        for _ in range(number):
            before |= wait_for_writing(tmp_path, before, launched)
        if number != 1:  # that one surely hits the file
            time.sleep(chance.random() * 0.1)
            launched.send(signal.SIGKILL, chance.choice([0, 1]))
            time.sleep(chance.random() * 0.02)
        launched.send(signal.SIGKILL)
        codes, printed = launched.wait()
        assert -signal.SIGKILL in codes, printed
        interrupted += bool(unfinished(tmp_path))
    print(f"{interrupted} saves were interrupted")
    assert interrupted, "no save was interrupted: nothing was tested"
    assert (tmp_path / "train.log").read_text().count("resuming at epoch") > 2
    assert_ends_equal(tmp_path, expected)


@pytest.mark.parametrize("first", [signal.SIGUSR1, signal.SIGTERM], ids=str)
def test_further_signals_during_the_save_do_not_harm_it(
    first: signal.Signals, tmp_path: Path, expected: dict[str, torch.Tensor]
) -> None:
    for rank in (0, 1):
        before = max((record.get("step", 0) for record in metrics(tmp_path)), default=0)
        launched = start(tmp_path, "--checkpoint_minutes", "0.002", fsync_s=0.1)
        wait_for_step(tmp_path, before + 3, launched)
        launched.send(first, rank)
        for number in range(200):
            time.sleep(0.01)
            with contextlib.suppress(ProcessLookupError):  # one that has just ended
                launched.send([signal.SIGTERM, signal.SIGUSR2, signal.SIGUSR1][number % 3], number % 2)
            if None not in [process.poll() for process in launched.processes]:
                break
        codes, printed = launched.wait()
        assert codes == [75, 75], printed
        state = read_checkpoint(tmp_path / "checkpoint.pth.tar")
        assert f"after step {state['step']} of {STEPS}" in printed
        assert metrics(tmp_path)[-1].get("step", state["step"]) == state["step"], "the stop's own step is saved"
        assert not list(tmp_path.rglob("*.tmp"))
    assert_ends_equal(tmp_path, expected)


def test_a_save_under_way_is_completed_when_the_run_ends_with_an_error(tmp_path: Path) -> None:
    """The loss becomes infinite while the last good state is still being written."""
    words = ["--checkpoint_minutes", "0.001", "--base_lr", "1e30", "--optimizer", "sgd", "--warmup_epochs", "0"]
    codes, printed = start(tmp_path, *words, fsync_s=0.2).wait()
    assert codes == [2, 2] and "not finite" in printed, printed
    if (tmp_path / "checkpoint.pth.tar").exists():
        state = read_checkpoint(tmp_path / "checkpoint.pth.tar")["state_dict"]
        assert all(torch.isfinite(value).all() for value in state.values())
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_full_disk_is_said_by_all_ranks_and_costs_nothing_before(
    tmp_path: Path, expected: dict[str, torch.Tensor]
) -> None:
    codes, printed = start(tmp_path, *OFTEN, full_after=5).wait()
    assert codes == [2, 2], printed
    said = [line for line in printed.splitlines() if "No space left on device" in line]
    assert len(said) == 2 and said[0] == said[1] and "rank1-of-2.pth: could not be written" in said[0]
    assert read_checkpoint(tmp_path / "checkpoint.pth.tar")["step"] > 0
    assert_ends_equal(tmp_path, expected)
