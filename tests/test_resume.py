"""Runs that are killed, signalled or moved to other ranks continue to the same weights."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from clusterssl.files import read_checkpoint
from tests.launch import TINY, Launched, metrics, wait_for_step

FLAGS = [*TINY, "--queue_length", "64", "--epoch_queue_starts", "1", "--batch_size"]
STEPS = 24


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state = read_checkpoint(folder / "checkpoint.pth.tar")
    assert state["step"] == STEPS and state["epoch"] == 4
    return state["state_dict"]


def finish(folder: Path, ranks: int, *flags: str) -> str:
    codes, printed = Launched("main_swav.py", *FLAGS, *flags, "--dump_path", str(folder), ranks=ranks).wait()
    assert codes == [0] * ranks, printed
    return printed


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_random_steps_ends_with_the_same_weights(ranks: int, tmp_path: Path) -> None:
    size = str(16 // ranks)
    finish(tmp_path / "whole", ranks, size)
    seed = int.from_bytes(os.urandom(4), "big")
    chance = random.Random(seed)
    folder, killed = tmp_path / "killed", 0
    for step in sorted(chance.sample(range(2, STEPS - 4), 3)):
        flags = [*FLAGS, size, "--checkpoint_minutes", "0", "--dump_path", str(folder)]
        launched = Launched("main_swav.py", *flags, ranks=ranks)
        wait_for_step(folder, step, launched)
        time.sleep(chance.random() * 0.02)
        launched.send(signal.SIGKILL)
        codes, _ = launched.wait()
        killed += -signal.SIGKILL in codes
    assert killed > 0, "every run ended before it was killed: nothing was tested"
    printed = finish(folder, ranks, size)
    assert "resuming at epoch" in printed
    expected, ours = weights(tmp_path / "whole"), weights(folder)
    for name, value in expected.items():
        assert torch.equal(ours[name], value), f"{name} differs (random seed {seed})"


@pytest.mark.parametrize(
    ("number", "rank"), [(signal.SIGTERM, 1), (signal.SIGUSR1, 0), (signal.SIGUSR2, None)], ids=str
)
def test_a_signal_to_any_rank_saves_and_exits_with_75(number: signal.Signals, rank: int | None, tmp_path: Path) -> None:
    flags = [*FLAGS, "8", "--epochs", "400", "--dump_path", str(tmp_path)]
    launched = Launched("main_swav.py", *flags, ranks=2)
    wait_for_step(tmp_path, 3, launched)
    launched.send(number, rank)
    codes, printed = launched.wait()
    assert codes == [75, 75], printed
    state = read_checkpoint(tmp_path / "checkpoint.pth.tar")
    assert state["step"] > 3 and f"after step {state['step']} of" in printed


def test_stopped_by_a_signal_and_resumed_ends_with_the_same_weights(tmp_path: Path) -> None:
    finish(tmp_path / "whole", 1, "16")
    for attempt in range(5):  # a fast run may end before the signal arrives
        folder = tmp_path / f"stopped{attempt}"
        launched = Launched("main_swav.py", *FLAGS, "16", "--dump_path", str(folder))
        wait_for_step(folder, 2, launched)
        launched.send(signal.SIGTERM)
        codes, _ = launched.wait()
        if codes == [75]:
            break
    assert codes == [75], "no run was stopped: nothing was tested"
    finish(folder, 1, "16")
    expected, ours = weights(tmp_path / "whole"), weights(folder)
    assert all(torch.equal(ours[name], value) for name, value in expected.items())
    steps = [record["step"] for record in metrics(folder) if "step" in record]
    assert steps == sorted(steps) and steps[-1] == STEPS


def test_continues_on_another_number_of_ranks(tmp_path: Path) -> None:
    """From one checkpoint, the next steps on two ranks are those of one rank: same images, same queue, same weights.

    Only the first ones are compared: rounding of sums in another order grows from step to step.
    """
    begun = tmp_path / "begun"
    launched = Launched(
        "main_swav.py", *FLAGS, "16", "--epochs", "9", "--checkpoint_minutes", "0", "--dump_path", str(begun)
    )
    wait_for_step(begun, 13, launched)
    launched.send(signal.SIGTERM)
    codes, printed = launched.wait()
    assert codes == [75], printed
    start = read_checkpoint(begun / "checkpoint.pth.tar")["step"]
    losses = {}
    for ranks, size in ((1, "16"), (2, "8")):
        folder = tmp_path / f"on{ranks}"
        shutil.copytree(begun, folder)
        flags = [*FLAGS, size, "--epochs", "9", "--dump_path", str(folder)]
        codes, printed = Launched("main_swav.py", *flags, ranks=ranks).wait()
        assert codes == [0] * ranks, printed
        losses[ranks] = {record["step"]: record["loss"] for record in metrics(folder) if "step" in record}
    for step in range(start + 1, start + 3):
        assert abs(losses[1][step] - losses[2][step]) < 1e-4 < abs(losses[1][step] - losses[1][step - 1])


def test_a_torn_checkpoint_falls_back_to_the_previous_one(tmp_path: Path) -> None:
    finish(tmp_path, 1, "16")
    current = tmp_path / "checkpoint.pth.tar"
    whole = current.read_bytes()
    expected = weights(tmp_path)
    current.unlink()
    current.write_bytes(whole[: len(whole) // 2])
    printed = finish(tmp_path, 1, "16")
    assert "falling back to checkpoint.previous.pth.tar" in printed and "resuming at epoch 3, step 0 of 6" in printed
    assert all(torch.equal(weights(tmp_path)[name], value) for name, value in expected.items())


def test_says_so_when_no_checkpoint_is_readable(tmp_path: Path) -> None:
    finish(tmp_path, 1, "16")
    for name in ("checkpoint.pth.tar", "checkpoint.previous.pth.tar"):
        (tmp_path / name).unlink()
        (tmp_path / name).write_bytes(b"torn")
    codes, printed = Launched("main_swav.py", *FLAGS, "16", "--dump_path", str(tmp_path)).wait()
    assert codes == [2] and "remove the file to start from the beginning" in printed
    assert (tmp_path / "checkpoint.pth.tar").read_bytes() == b"torn"
