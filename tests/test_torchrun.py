"""torchrun starts all ranks again when one is killed, and the run goes on by itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from clusterssl.files import read_checkpoint
from tests.launch import ROOT, TINY, Launched, metrics

FLAGS = [*TINY, "--batch_size", "8", "--epochs", "10"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
SLOWLY = str(ROOT / "tests" / "slurm" / "slowly.py")


def worker(agent: int, rank: int, restarts: int) -> int:
    """Process of a rank after so many restarts, 0 if there is none."""
    for child in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
        try:
            variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        except OSError:  # it has just ended
            continue
        if {b"RANK=%d" % rank, b"TORCHELASTIC_RESTART_COUNT=%d" % restarts} <= set(variables):
            return int(child)
    return 0


def kill_later(agent: subprocess.Popen[str], folder: Path, rank: int, restarts: int) -> int:
    """SIGKILL for a rank, some steps after that start; the last step that was seen."""
    begin, end = None, time.monotonic() + 240
    while time.monotonic() < end and agent.poll() is None:
        process = worker(agent.pid, rank, restarts)
        steps = [record["step"] for record in metrics(folder) if "step" in record]
        if process and begin is None:
            begin = len(steps)
        if process and begin is not None and len(steps) >= begin + 6:
            os.kill(process, signal.SIGKILL)
            return steps[-1]
        time.sleep(0.02)
    raise AssertionError(f"rank {rank} did not train after {restarts} restarts")


@pytest.mark.slow
def test_killed_ranks_are_started_again_and_end_with_the_same_weights(tmp_path: Path) -> None:
    codes, printed = Launched("main_swav.py", *FLAGS, "--dump_path", str(tmp_path / "whole"), ranks=2).wait()
    assert codes == [0, 0], printed
    folder, said = tmp_path / "killed", tmp_path / "said"
    words = [*TORCHRUN, SLOWLY, str(ROOT / "main_swav.py"), *FLAGS, "--checkpoint_minutes", "1e-6"]
    with said.open("w") as out:
        agent = subprocess.Popen(
            [*words, "--dump_path", str(folder)], stdout=out, stderr=out, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        try:
            steps = [kill_later(agent, folder, rank, restarts) for restarts, rank in enumerate((1, 0))]
            assert agent.wait(timeout=240) == 0, said.read_text()
        finally:
            agent.kill()
            agent.wait()
    assert steps[0] < steps[1] < 60
    assert said.read_text().count("resuming at epoch") == 2
    whole, ours = (read_checkpoint(path / "checkpoint.pth.tar") for path in (tmp_path / "whole", folder))
    assert ours["step"] == whole["step"] == 60
    assert all(torch.equal(ours["state_dict"][name], value) for name, value in whole["state_dict"].items())
    assert len((folder / "launches.jsonl").read_text().splitlines()) == 3
