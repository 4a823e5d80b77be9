"""SeLa, both versions, as processes: kills, other numbers of ranks, and the labels of the digits."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clusterssl.files import read_checkpoint
from tests.launch import TINY, Launched, metrics, wait_for_step

COMMON = ["--data_path", "synthetic:100:24x24", "--batch_size"]
FLAGS = {
    "2": [*TINY, "--nmb_prototypes", "12", "9", "5", *COMMON],
    "2 soft": [*TINY, "--nmb_prototypes", "12", "9", "5", "--label_clusters", "3", *COMMON],
    "1": ["--version", "1", "--size_crops", "16", "--arch", "conv4w4", "--hc", "2", "--ncl", "6", "--nopts", "7",
          "--base_lr", "0.1", "--epochs", "4", "--workers", "0", "--log_freq", "1", "--device", "cpu", *COMMON],
}  # fmt: skip
LAST = 24
"""of 4 epochs of 6 steps; version 1 labels before steps 0, 1, 3, 7, 12, 18 of 100 images, 16 a step"""


def finish(version: str, folder: Path, ranks: int, *flags: str) -> str:
    words = [*FLAGS[version], str(16 // ranks), *flags, "--dump_path", str(folder)]
    codes, printed = Launched("main_sela.py", *words, ranks=ranks).wait()
    assert codes == [0] * ranks, printed
    return printed


def ended(folder: Path) -> dict[str, Tensor]:
    """Weights, labels and potentials at the end of a run."""
    state = read_checkpoint(folder / "checkpoint.pth.tar")
    method = state["method_state"]
    potentials = {f"potentials{h}": row for h, row in enumerate(method["potentials"])}
    assert state["step"] == LAST
    return {**state["state_dict"], **potentials, "labels": method["labels"]}


@pytest.mark.parametrize(("version", "ranks"), [("1", 1), ("1", 2), ("2 soft", 1), ("2", 2)])
def test_killed_at_random_steps_ends_with_the_same_weights(version: str, ranks: int, tmp_path: Path) -> None:
    finish(version, tmp_path / "whole", ranks)
    seed = int.from_bytes(os.urandom(4), "big")
    chance = random.Random(seed)
    folder, killed = tmp_path / "killed", 0
    for step in (chance.randrange(1, 8), chance.randrange(9, LAST - 4)):
        flags = [*FLAGS[version], str(16 // ranks), "--checkpoint_minutes", "0", "--dump_path", str(folder)]
        launched = Launched("main_sela.py", *flags, ranks=ranks)
        wait_for_step(folder, step, launched)
        time.sleep(chance.random() * 0.03)
        launched.send(signal.SIGKILL)
        killed += -signal.SIGKILL in launched.wait()[0]
    assert killed > 0, "every run ended before it was killed: nothing was tested"
    assert "resuming at epoch" in finish(version, folder, ranks)
    ours = ended(folder)
    for name, value in ended(tmp_path / "whole").items():
        assert torch.equal(ours[name], value), f"{name} differs (random seed {seed})"


@pytest.mark.parametrize("version", ["1", "2"])
def test_a_run_of_two_ranks_continues_on_one(version: str, tmp_path: Path) -> None:
    """Over the next labels: same labels, same losses."""
    begun = tmp_path / "begun"
    flags = [*FLAGS[version], "8", "--checkpoint_minutes", "0", "--epochs", "9", "--dump_path", str(begun)]
    launched = Launched("main_sela.py", *flags, ranks=2)
    wait_for_step(begun, 16, launched)
    launched.send(signal.SIGTERM)
    codes, printed = launched.wait()
    assert codes == [75, 75], printed
    start = read_checkpoint(begun / "checkpoint.pth.tar")["step"]
    losses = {}
    for ranks in (1, 2):
        shutil.copytree(begun, tmp_path / f"on{ranks}")
        finish(version, tmp_path / f"on{ranks}", ranks, "--epochs", "9")
        losses[ranks] = {r["step"]: r["loss"] for r in metrics(tmp_path / f"on{ranks}") if "step" in r}
    for step in range(start + 1, start + 3):
        assert abs(losses[1][step] - losses[2][step]) < 1e-4 < abs(losses[1][step] - losses[1][step - 1])


@pytest.mark.parametrize("version", ["1", "2"])
def test_labels_of_the_digits_are_balanced(version: str, tmp_path: Path) -> None:
    """Exactly with --equal_labels; without, an untrained network's plan is soft, and its largest entries less even."""
    words = ["--version", version, "--epochs", "2", "--seed", "7", "--device", "cpu"]
    words += ["--nopts", "3", "--hc", "2", "--ncl", "60"] if version == "1" else []
    for equal in ("false", "true"):
        folder = tmp_path / equal
        codes, printed = Launched("main_sela.py", *words, "--equal_labels", equal, "--dump_path", str(folder)).wait()
        assert codes == [0], printed
        labels = read_checkpoint(folder / "checkpoint.pth.tar")["method_state"]["labels"]
        assert labels.shape == (2 if version == "1" else 3, 1000)
        counts = torch.stack([torch.bincount(row, minlength=60) for row in labels])  # of 1000 images, 16.7 each
        assert counts.shape[1] == 60
        if equal == "true":
            assert counts.min() == 16 and counts.max() == 17
        else:
            assert counts.max() <= 60 and (counts == 0).double().mean() < 0.05
