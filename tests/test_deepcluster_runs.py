"""main_deepcluster.py as its users run it: killed, stopped, moved to other ranks, given bad input."""

from __future__ import annotations

import random
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import main_deepcluster
from clusterssl import config as cfg
from clusterssl.files import read_checkpoint
from clusterssl.models.headed import HeadedNet
from clusterssl.models.weights import model_from_weights
from tests.launch import Launched, metrics, wait_for_step

TINY = [
    *("--data_path", "synthetic:96:24x24", "--size_crops", "16", "--arch", "conv4w4", "--nmb_cluster", "12"),
    *("--pca_dim", "16", "--base_lr", "0.1", "--epochs", "4", "--workers", "0", "--log_freq", "1", "--device", "cpu"),
    *("--checkpoint_minutes", "0", "--report", "false"),
]
PIC = ["--clustering", "PIC", "--pic_neighbours", "2"]
STEPS = 24


def finish(folder: Path, ranks: int, *flags: str) -> str:
    words = [*TINY, "--batch_size", str(16 // ranks), *flags, "--dump_path", str(folder)]
    codes, printed = Launched("main_deepcluster.py", *words, ranks=ranks).wait()
    assert codes == [0] * ranks, printed
    return printed


def interrupted(folder: Path, ranks: int, step: int, number: signal.Signals, *flags: str) -> list[int]:
    words = [*TINY, "--batch_size", str(16 // ranks), *flags, "--dump_path", str(folder)]
    launched = Launched("main_deepcluster.py", *words, ranks=ranks)
    wait_for_step(folder, step, launched)
    time.sleep(random.random() * 0.03)
    launched.send(number)
    return launched.wait()[0]


@pytest.mark.parametrize(("ranks", "flags"), [(2, []), (1, PIC)], ids=["k-means", "PIC"])
def test_killed_and_resumed_ends_with_the_same_weights(ranks: int, flags: list[str], tmp_path: Path) -> None:
    finish(tmp_path / "whole", ranks, *flags)
    folder, killed = tmp_path / "killed", 0
    for step in (random.randrange(1, 10), random.randrange(11, 20)):
        killed += -signal.SIGKILL in interrupted(folder, ranks, step, signal.SIGKILL, *flags)
    assert killed > 0, "every run ended before it was killed: nothing was tested"
    assert "resuming at epoch" in finish(folder, ranks, *flags)
    expected, ours = (read_checkpoint(place / "checkpoint.pth.tar") for place in (tmp_path / "whole", folder))
    assert expected["step"] == STEPS
    assert all(torch.equal(ours["state_dict"][name], value) for name, value in expected["state_dict"].items())
    assert torch.equal(ours["method_state"]["labels"], expected["method_state"]["labels"])
    rounds = [np.load(place / "clusters" / "epoch0003.npz")["labels"] for place in (tmp_path / "whole", folder)]
    assert (rounds[0] == rounds[1]).all()
    if flags:
        found = [int(np.load(path)["labels"].max()) + 1 for path in sorted((folder / "clusters").iterdir())]
        assert len(set(found)) > 1, "PIC found equally many clusters each time: nothing was tested"
        assert len(expected["state_dict"]["top_layer.bias"]) == found[-1]


def test_continues_on_another_number_of_ranks(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    assert interrupted(begun, 2, 14, signal.SIGTERM, "--epochs", "9") == [75, 75]
    start = read_checkpoint(begun / "checkpoint.pth.tar")["step"]
    losses = {}
    for ranks in (1, 2):
        folder = tmp_path / f"on{ranks}"
        shutil.copytree(begun, folder)
        finish(folder, ranks, "--epochs", "9")
        losses[ranks] = {record["step"]: record["loss"] for record in metrics(folder) if "step" in record}
    for step in range(start + 1, start + 3):
        assert abs(losses[1][step] - losses[2][step]) < 1e-4 < abs(losses[1][step] - losses[1][step - 1])


def test_a_network_rebuilt_from_the_checkpoint_predicts_clusters(tmp_path: Path) -> None:
    finish(tmp_path, 1, "--epochs", "1", "--sobel")
    net = model_from_weights(str(tmp_path / "checkpoint.pth.tar")).eval()
    ids = net.predict(torch.randn(5, 3, 16, 16))
    assert ids.dtype == torch.int64 and ids.max() < 12
    assert isinstance(net, HeadedNet) and net.relu_before_heads


LOSSES = [
    *(1.7857, 1.8315, 1.7751, 1.6983, 1.7414, 1.7161, 1.5565, 1.4937, 1.6479, 1.9957),
    *(1.7897, 1.6421, 1.8688, 1.2530, 1.1360, 1.2298, 1.0376, 1.2104, 1.0293, 0.7894),
]
"""of two rounds of 10 steps, recorded when this test was written"""


def test_the_first_twenty_losses_are_the_recorded_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four well-spread components, so that no rounding of another processor moves an image to another cluster."""
    flags = "--nmb_cluster 6 --pca_dim 4 --base_lr 0.5 --epochs 2 --reassign 1.7 --batch_size 16"
    monkeypatch.setattr(sys, "argv", ["main_deepcluster.py", *TINY, *flags.split(), "--dump_path", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        cfg.entry(main_deepcluster.main)
    assert end.value.code == 0
    losses = [record["loss"] for record in metrics(tmp_path) if "step" in record]
    assert losses == pytest.approx(LOSSES, abs=2e-3)


def refused(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(sys, "argv", ["main_deepcluster.py", *words])
    with pytest.raises(SystemExit) as end:
        cfg.entry(main_deepcluster.main)
    error = capsys.readouterr().err
    assert end.value.code == 2 and len(error.strip().splitlines()) == 1
    return error


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--k 97", "--nmb_cluster 97: more clusters than the 96 images"),
        ("--clustering PIC --pic_neighbours 96", "--pic_neighbours 96: needs more than 96 images, there are 96"),
        ("--clustering kmeans", "Kmeans"),
        ("--nmb_clusters 5", "--nmb_clusters: unknown flag; did you mean --nmb_cluster?"),
        ("--reassign 0.05", "global batch of 16 images"),
        ("--momentum 1", "--momentum 1.0"),
        ("--wd -x", "--wd"),
    ],
)
def test_bad_input_is_one_line(
    flags: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words_given = [*TINY, "--batch_size", "16", "--dump_path", str(tmp_path / "run"), *flags.split()]
    error = refused(words_given, monkeypatch, capsys)
    assert words in error, error
    assert not (tmp_path / "run").exists()
