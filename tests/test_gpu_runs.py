"""Whole runs as they are on a GPU: mixed precision, compiled, killed and gone on with; one of them on a CPU, too."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from clusterssl.compiling import require_compiler
from clusterssl.errors import UserError
from tests.launch import TINY, Launched, metrics, wait_for_step

ON_A_GPU = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture
def there(device: str) -> str:
    """The device; skips where there is no compiler for it."""
    try:
        require_compiler(torch.device(device))
    except UserError as error:
        pytest.skip(str(error))
    return device


def losses(folder: Path, *flags: str) -> dict[int, float]:
    """Of every step of a run; the last record of a step counts."""
    codes, printed = Launched("main_swav.py", *TINY, "--dump_path", str(folder), *flags).wait()
    assert codes == [0], printed
    return {record["step"]: record["loss"] for record in metrics(folder) if "step" in record}


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", ON_A_GPU])
def test_a_compiled_run_goes_on_after_a_kill(there: str, tmp_path: Path) -> None:
    flags = ["--device", there, "--compile", "true", "--batch_size", "16", "--checkpoint_minutes", "0"]
    expected = losses(tmp_path / "whole", *flags)
    killed = Launched("main_swav.py", *TINY, "--dump_path", str(tmp_path / "killed"), *flags)
    wait_for_step(tmp_path / "killed", 9, killed)
    killed.send(signal.SIGKILL)
    assert killed.wait()[0] == [-signal.SIGKILL]
    ours = losses(tmp_path / "killed", *flags)
    assert ours.keys() == expected.keys() and len(ours) == 24
    assert all(ours[step] == pytest.approx(expected[step], rel=2e-2) for step in ours)


@pytest.mark.gpu
@pytest.mark.parametrize("device", [ON_A_GPU])
@pytest.mark.parametrize("flags", [["--compile"], ["--cuda_graphs"]], ids=["compiled", "cuda_graphs"])
def test_what_makes_steps_faster_leaves_them_the_same(there: str, flags: list[str], tmp_path: Path) -> None:
    more = ["--device", there, "--batch_size", "16", "--base_lr", "0.05"]
    expected, ours = losses(tmp_path / "plain", *more), losses(tmp_path / "ours", *more, *flags, "true")
    assert ours.keys() == expected.keys()
    assert all(ours[step] == pytest.approx(expected[step], rel=2e-2) for step in ours)
