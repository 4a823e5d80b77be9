"""Runs whose images live on the training device: the same training, however it is cut into launches."""

from __future__ import annotations

import signal
from pathlib import Path

import torch

from clusterssl.files import read_checkpoint
from tests.launch import TINY, Launched, metrics, wait_for_step

RESIDENT = [*TINY, "--cache", "device", "--batch_size"]


def finish(folder: Path, *words: str, ranks: int = 1) -> str:
    codes, said = Launched("main_swav.py", *words, "--dump_path", str(folder), ranks=ranks).wait()
    assert codes == [0] * ranks, said
    return said


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(folder / "checkpoint.pth.tar")["state_dict"]


def assert_same_weights(ours: Path, expected: Path) -> None:
    for name, value in weights(expected).items():
        assert torch.equal(weights(ours)[name], value), name


def test_training_is_that_of_the_other_paths_also_after_a_kill(tmp_path: Path) -> None:
    said = finish(tmp_path / "resident", *RESIDENT, "16")
    assert "--cache device: 96 images" in said
    finish(tmp_path / "loaded", *TINY, "--batch_size", "16")
    assert_same_weights(tmp_path / "resident", tmp_path / "loaded")
    words = [*RESIDENT, "16", "--checkpoint_minutes", "0", "--dump_path", str(tmp_path / "killed")]
    launched = Launched("main_swav.py", *words)
    wait_for_step(tmp_path / "killed", 8, launched)
    launched.send(signal.SIGKILL)
    codes, _ = launched.wait()
    assert codes == [-signal.SIGKILL], "it ended before it was killed: nothing was tested"
    assert "resuming at epoch" in finish(tmp_path / "killed", *RESIDENT, "16")
    assert_same_weights(tmp_path / "killed", tmp_path / "resident")


def test_two_ranks_train_as_with_loaders(tmp_path: Path) -> None:
    finish(tmp_path / "resident", *RESIDENT, "8", ranks=2)
    finish(tmp_path / "loaded", *TINY, "--batch_size", "8", ranks=2)
    finish(tmp_path / "alone", *RESIDENT, "16")
    assert_same_weights(tmp_path / "resident", tmp_path / "loaded")
    first, alone = ([record["loss"] for record in metrics(tmp_path / name)] for name in ("resident", "alone"))
    torch.testing.assert_close(torch.tensor(first[:6]), torch.tensor(alone[:6]), rtol=1e-3, atol=1e-3)


def test_without_a_gpu_none_decodes(tmp_path: Path) -> None:
    words = [*TINY, "--batch_size", "16", "--dump_path", str(tmp_path), "--decode", "gpu"]
    codes, said = Launched("main_swav.py", *words).wait()
    assert codes == [2] and "--decode gpu: needs a CUDA GPU, and this run is on cpu" in said
    codes, said = Launched("main_swav.py", *words, "--cache", "device").wait()
    assert codes == [2] and "--cache device --decode gpu" in said
    assert not list(tmp_path.iterdir())
