"""Tiny trainings as jobs of a test cluster, through the recipe scripts that users submit."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.launch import ROOT, TINY, metrics
from tests.slurm.cluster import Cluster, until

RECIPE = ROOT / "scripts" / "swav_100ep_pretrain.sh"
SLOWLY = ROOT / "tests" / "slurm" / "slowly.py"
STEPS = 120
TINY_JOB = [*TINY, "--batch_size", "8", "--epochs", "20", "--sync_bn", "none"]
"""a run of 120 steps on two ranks; some seconds long, as jobs pause after each step"""


def submit(cluster: Cluster, folder: Path, *flags: str, options: tuple[str, ...] = (), tasks: int = 1) -> str:
    """Number of the job that runs a recipe with these flags in the end, on two nodes, in run directory folder/run."""
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nshift\nexec {sys.executable} -u {SLOWLY} "$@"\n')
    python.chmod(0o755)
    environment = {
        "DATASET_PATH": "synthetic:96:24x24", "EXPERIMENT_PATH": folder / "run", "PYTHON": python,
        "OMP_NUM_THREADS": 1,
    }  # fmt: skip
    return cluster.submit(
        "--nodes=2", f"--ntasks-per-node={tasks}", f"--gpus-per-node={tasks}", "--cpus-per-task=1", "--mem=4G",
        f"--output={folder}/job.log", "--export=" + ",".join(["ALL", *(f"{k}={v}" for k, v in environment.items())]),
        *options, RECIPE, *flags, cwd=ROOT,
    )  # fmt: skip


def log(folder: Path) -> str:
    """What the job has printed so far."""
    path = folder / "job.log"
    return path.read_text() if path.exists() else "the job has not started"


def last_step(folder: Path) -> int:
    """Steps that the run directory knows of."""
    return max((record.get("step", 0) for record in metrics(folder / "run")), default=0)


def go_on(folder: Path, steps: int = 5) -> int:
    """Wait until the run is some steps further than now; returns the step."""
    begin = last_step(folder)
    until(lambda: last_step(folder) >= begin + steps, 300, lambda: f"no step after {begin}:\n{log(folder)}")
    return last_step(folder)


def ranks_on(cluster: Cluster, node: str) -> list[str]:
    """Process numbers of the training on a node."""
    found = cluster.on(node, "sh", "-c", "pgrep -f '^[^ ]*python[^ ]* -u [^ ]*slowly.py [^ ]*main_swav.py' || true")
    return found.split()
