"""The sbatch files: Slurm accepts all of them, and one runs from its first line to its last."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch import ROOT, metrics
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import TINY_JOB, log, submit
from tests.slurm.settings import Shape

SIXTEEN = Shape(16, features="volta32gb", partitions=("learnfair",))
SCRIPTS = sorted(path for path in (ROOT / "scripts").glob("*.sh") if "\n#SBATCH" in path.read_text())


def test_there_are_scripts() -> None:
    assert len(SCRIPTS) >= 9


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_slurm_accepts(script: Path, start_cluster: Callable[[Shape], Cluster]) -> None:
    start_cluster(SIXTEEN).run("sbatch", "--test-only", str(script), cwd=ROOT)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_is_written_as_all_are(script: Path) -> None:
    text = script.read_text()
    assert text.startswith("#!/bin/bash\n#SBATCH ")
    words = ["--requeue", "--open-mode=append", "--signal=USR1@"]
    if not re.search(r"^exec .* scripts/\w+\.sh ", text, re.M):  # which is one of these, too
        words += ["export SRUN_CPUS_PER_TASK=", 'exec srun --kill-on-bad-exit=1 bash -c \'trap "" USR1; exec']
        words += ["${DATASET_PATH:?", "${EXPERIMENT_PATH:?"]
    assert [word for word in words if word not in text] == []
    assert text.rstrip().endswith('"$@"'), "flags after the script's name are passed on"
    assert "MASTER" not in text and ":0:" not in text, "addresses are found by the program"


def test_says_what_is_unset(cluster: Cluster, tmp_path: Path) -> None:
    options = ["--nodes=1", "--ntasks-per-node=1", "--output=job.log", "--mem=1G", "--export=PATH"]
    job = cluster.submit(*options, SCRIPTS[0], cwd=tmp_path)
    assert cluster.wait(job)["JobState"] == "FAILED"
    assert "DATASET_PATH: set it to the folder of training images" in log(tmp_path)


@pytest.mark.slow
def test_runs_for_real(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, *TINY_JOB, "--epochs", "1", "--batch_size", "12", tasks=2)
    assert cluster.wait(job)["ExitCode"] == "0:0", log(tmp_path)
    steps = [record["step"] for record in metrics(tmp_path / "run") if "step" in record]
    assert steps == [1, 2], "96 images are 2 steps of 4 ranks with 12 each"
    assert "4 ranks (srun)" in log(tmp_path)
