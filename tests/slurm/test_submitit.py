"""run_with_submitit.py on the real cluster: submitted, requeued, continued, evaluated; and its refusals."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clusterssl.files import read_checkpoint
from tests.launch import ROOT, Launched, metrics
from tests.slurm.cluster import Cluster, until
from tests.slurm.jobs import SLOWLY, STEPS, TINY_JOB

SUBMIT = str(ROOT / "run_with_submitit.py")
SMALL = ["--cpus", "1", "--mem", "4G", "--timeout", "60"]
SLOW_RUN = [str(SLOWLY), str(ROOT / "main_swav.py"), *TINY_JOB]


def launch(cluster: Cluster, *words: str | Path, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the launcher on the login node."""
    env = {**cluster.env, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, SUBMIT, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd, timeout=400)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def job_of(done: subprocess.CompletedProcess[str]) -> str:
    found = re.search(r"^job (\S+): log in", done.stdout, re.M)
    assert found, done.stdout
    return found[1]


@pytest.mark.parametrize("more", [[], ["--array", "seeds", "0", "1"], ["--constraint", "a", "--account", "b"]])
def test_slurm_accepts_the_file_of_a_dry_run(cluster: Cluster, tmp_path: Path, more: list[str]) -> None:
    flags = ["--nodes", "2", "--ngpus", "4", "--partition", "main", "--comment", "two words", "--dry_run", *more]
    shown = launch(cluster, *flags, "main_swav.py", "--dump_path", "run", cwd=tmp_path).stdout
    file = tmp_path / "dry.sh"
    file.write_text(shown.replace("#SBATCH --constraint=a\n", ""))
    cluster.run("sbatch", "--test-only", str(file))
    for words in ("--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--comment='two words'", "--time=4320"):
        assert f"#SBATCH {words}\n" in shown
    assert "#SBATCH --requeue" in shown and ("--constraint=a" in shown) == ("--constraint" in more)


def refused(env: dict[str, str], cwd: Path, *words: str) -> str:
    done = subprocess.run([sys.executable, SUBMIT, *words], capture_output=True, text=True, env=env, cwd=cwd)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stdout + done.stderr
    return done.stderr


def test_refusals(cluster: Cluster, tmp_path: Path) -> None:
    nowhere = {**os.environ, "PATH": "/nowhere"}
    assert "sbatch, srun, scontrol: not on PATH" in refused(nowhere, tmp_path, "main_swav.py")
    assert "no such script" in refused(cluster.env, tmp_path, "main_swa.py")
    assert "name the script" in refused(cluster.env, tmp_path, "--nodes", "2")
    assert "did you mean --nodes?" in refused(cluster.env, tmp_path, "--node", "2", "main_swav.py")
    assert "--job_dir /proc/jobs: cannot be" in refused(
        cluster.env, tmp_path, "--job_dir", "/proc/jobs", "main_swav.py"
    )
    assert "needs --dump_path" in refused(cluster.env, tmp_path, "--chain", "eval_knn", "main_swav.py")
    assert "needs --dump_path" in refused(cluster.env, tmp_path, "--sweep", "base_lr=1,2", "main_swav.py")
    assert "sbatch refused the job" in refused(cluster.env, tmp_path, "--partition", "none", "main_swav.py")


def test_any_script_its_flags_untouched_and_its_exit_code(cluster: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "any.py"
    # Whichever task ends first has the other terminated: they end when both have come so far.
    script.write_text(
        "import os, pathlib, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('given', sys.argv[1:], flush=True); here = pathlib.Path(__file__).parent\n"
        "(here / ('began' + os.environ['SLURM_PROCID'])).touch()\n"
        "while len(list(here.glob('began*'))) < 2: time.sleep(0.05)\n"
        "sys.exit(int(sys.argv[1]))\n"
    )
    words = ["--wait", "--ngpus", "2", *SMALL, script]
    done = launch(cluster, *words, "3", "--nodes", "x y", "--wait", cwd=tmp_path, code=3)
    assert "given ['3', '--nodes', 'x y', '--wait']" in done.stdout
    number = job_of(done)
    assert (tmp_path / "runs" / "jobs" / number / f"{number}_1_log.out").exists()
    assert cluster.job(number)["JobState"] == "FAILED"


@pytest.mark.slow
def test_requeues_through_submitit_and_ends_equal(cluster: Cluster, tmp_path: Path) -> None:
    codes, printed = Launched("main_swav.py", *TINY_JOB, "--dump_path", str(tmp_path / "whole"), ranks=2).wait()
    assert codes == [0, 0], printed
    folder = tmp_path / "run"
    done = launch(cluster, "--nodes", "2", "--ngpus", "1", *SMALL, *SLOW_RUN, "--dump_path", folder, cwd=tmp_path)
    job = job_of(done)
    log = tmp_path / "runs" / "jobs" / job / f"{job}_0_log.out"
    until(lambda: len(metrics(folder)) > 5, 300, lambda: log.read_text())
    cluster.run("scancel", "--signal=USR2", job)
    cluster.wait(job, "PENDING")
    ended = cluster.wait(job)
    assert (ended["ExitCode"], ended["Restarts"]) == ("0:0", "1"), log.read_text()
    assert "Calling checkpoint method" in log.read_text() and "(100 remaining timeouts)" in log.read_text()
    ours, expected = (
        read_checkpoint(path / "checkpoint.pth.tar")["state_dict"] for path in (folder, tmp_path / "whole")
    )
    assert all(torch.equal(ours[name], value) for name, value in expected.items())


@pytest.mark.slow
def test_a_sweep_with_evaluations_and_reports(cluster: Cluster, tmp_path: Path) -> None:
    flags = ["--data_path", "digits", "--epochs", "1", "--dump_path", tmp_path / "run"]
    knn = "eval_knn --nb_knn 5 --device cpu"
    words = ["--wait", "--ngpus", "1", *SMALL, "--sweep", "base_lr=0.001,0.002", "--chain", knn]
    done = launch(
        cluster,
        *words,
        "main_swav.py",
        *flags,
        "--arch",
        "conv4",
        "--size_crops",
        "32",
        "--device",
        "cpu",
        cwd=tmp_path,
    )
    for rate in ("0.001", "0.002"):
        run = tmp_path / "run" / f"base_lr-{rate}"
        assert "knn" in (run / "report.html").read_text(), done.stdout
        assert (run / "eval_knn" / "evaluations.jsonl").exists()


@pytest.mark.slow
def test_here_without_slurm(tmp_path: Path) -> None:
    """Also stopped and continued: submitit starts its tasks again by itself."""
    folder = tmp_path / "run"
    command = [
        sys.executable,
        SUBMIT,
        "--local",
        "--ngpus",
        "2",
        "--timeout",
        "20",
        *SLOW_RUN,
        "--dump_path",
        str(folder),
    ]
    started = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    until(lambda: len(metrics(folder)) > 5, 300, "the run does not begin")
    (controller,) = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    os.kill(int(controller), signal.SIGTERM)  # it passes it on to its tasks
    printed, _ = started.communicate(timeout=300)
    assert started.returncode == 0, printed
    assert "stopped by SIGTERM" in printed and "resuming at epoch" in printed
    assert read_checkpoint(folder / "checkpoint.pth.tar")["step"] == STEPS
