"""Jobs that are signalled, preempted, or lose a node continue to the same weights; a cancelled one stays away."""

from __future__ import annotations

import re
import shlex
import signal
import sys
from pathlib import Path

import pytest
import torch

from clusterssl.files import read_checkpoint
from tests.launch import ROOT, Launched
from tests.slurm.cluster import Cluster, until
from tests.slurm.faults import Fault, cut_link, endure_as_job, failed_node, stopped_rank, urgent_job
from tests.slurm.jobs import RECIPE, SLOWLY, STEPS, TINY_JOB, go_on, log, ranks_on, submit
from tests.test_recipes import flags_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Weights of the run that nobody disturbed, without Slurm."""
    folder = tmp_path_factory.mktemp("whole")
    flags = [*flags_of(RECIPE)[1], *TINY_JOB, "--dump_path", str(folder)]
    codes, printed = Launched("main_swav.py", *flags, ranks=2).wait()
    assert codes == [0, 0], printed
    return read_checkpoint(folder / "checkpoint.pth.tar")["state_dict"]


def assert_finished(cluster: Cluster, job: str, folder: Path, restarts: int, expected: dict[str, torch.Tensor]) -> None:
    ended = cluster.wait(job)
    assert (ended["ExitCode"], ended["Restarts"]) == ("0:0", str(restarts)), log(folder)
    state = read_checkpoint(folder / "run" / "checkpoint.pth.tar")
    assert state["step"] == STEPS
    for name, value in expected.items():
        assert torch.equal(state["state_dict"][name], value), name


def restarted(cluster: Cluster, job: str, folder: Path, restarts: int) -> None:
    """Wait until a job has been requeued that many times."""
    cluster.wait(job, "PENDING")
    assert cluster.wait(job, "RUNNING")["Restarts"] == str(restarts), log(folder)


def test_survives_signals(cluster: Cluster, tmp_path: Path, expected: dict[str, torch.Tensor]) -> None:
    """To the batch script, to one rank, to all ranks: each time all stop at one step and go on from there.

    One that comes while Python is still importing is ignored.
    """
    job = submit(cluster, tmp_path, *TINY_JOB)
    until(lambda: bool(ranks_on(cluster, "node2")), 60, lambda: log(tmp_path))
    cluster.run("scancel", "--signal=USR1", job)
    stopped = []
    for number, send in enumerate(
        (
            lambda: cluster.run("scancel", "--batch", "--signal=USR1", job),
            lambda: cluster.on("node2", "kill", f"-{signal.SIGUSR2:d}", *ranks_on(cluster, "node2")),
            lambda: cluster.run("scancel", "--signal=TERM", job),
        ),
        start=1,
    ):
        go_on(tmp_path)
        send()
        restarted(cluster, job, tmp_path, number)
        stopped.append(read_checkpoint(tmp_path / "run" / "checkpoint.pth.tar")["step"])
    assert_finished(cluster, job, tmp_path, 3, expected)
    assert re.search(r"a save takes \d+\.\d s, a preemption leaves 15 s", log(tmp_path)), "GraceTime and KillWait"
    for step in stopped:
        assert f"resuming at epoch {step // 6}, step {step % 6} of 6" in log(tmp_path)


def test_survives_a_signal_under_torchrun(cluster: Cluster, tmp_path: Path, expected: dict[str, torch.Tensor]) -> None:
    """Its agent passes on SIGTERM."""
    flags = shlex.join([*flags_of(RECIPE)[1], *TINY_JOB, "--dump_path", str(tmp_path / "run")])
    script = tmp_path / "torchrun.sh"
    script.write_text(
        "#!/bin/bash\n#SBATCH --nodes=2 --ntasks-per-node=1 --requeue --open-mode=append --output=job.log --mem=4G\n"
        f"export OMP_NUM_THREADS=1\nsrun {sys.executable} -m torch.distributed.run --nnodes=2 --nproc-per-node=1 "
        f"--rdzv-backend=c10d --rdzv-id=$SLURM_JOB_ID --rdzv-endpoint=node1:29500 {SLOWLY} main_swav.py {flags}\n"
    )
    job = cluster.submit(f"--chdir={ROOT}", f"--output={tmp_path}/job.log", script, cwd=tmp_path)
    go_on(tmp_path)
    cluster.run("scancel", "--signal=TERM", job)
    restarted(cluster, job, tmp_path, 1)
    assert_finished(cluster, job, tmp_path, 1, expected)


@pytest.mark.parametrize("faults", [(urgent_job, failed_node, cut_link), (stopped_rank,)], ids=lambda f: f[0].__name__)
def test_survives_one_fault_after_another(
    faults: tuple[Fault, ...], cluster: Cluster, tmp_path: Path, expected: dict[str, torch.Tensor]
) -> None:
    story = endure_as_job(cluster, tmp_path, *faults)
    assert (story.codes[-1], story.restarts) == ([0], len(faults)), story.printed[0]
    assert not story.orphans and story.lost <= 6, "an epoch, which ends with a checkpoint, has 6 steps"
    state = read_checkpoint(tmp_path / "run" / "checkpoint.pth.tar")["state_dict"]
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_tells_what_the_signal_leaves_where_nothing_preempts(cluster: Cluster, tmp_path: Path) -> None:
    """The recipe asks for 180 seconds."""
    job = submit(cluster, tmp_path, *TINY_JOB, "--epochs", "1", options=("--partition=urgent",))
    assert cluster.wait(job)["ExitCode"] == "0:0", log(tmp_path)
    assert re.search(r"a save takes \d+\.\d s, your signal leaves 180 s", log(tmp_path)), log(tmp_path)


def test_a_cancelled_job_stays_away(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, *TINY_JOB, "--epochs", "4000")
    go_on(tmp_path)
    cluster.run("scancel", job)
    ended = cluster.wait(job)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")
    assert "stopped by SIGTERM" in log(tmp_path) and "not requeued: its state is" in log(tmp_path)


def test_the_last_task_of_an_array_requeues_itself_only(cluster: Cluster, tmp_path: Path) -> None:
    """Its job number is that of the whole array."""
    script = tmp_path / "array.sh"
    script.write_text(
        "#!/bin/bash\n#SBATCH --array=0-1 --requeue\n"
        f"exec srun {sys.executable} {ROOT}/tests/slurm/requeue_once.py $SLURM_ARRAY_TASK_ID\n"
    )
    job = cluster.submit(script, cwd=tmp_path)
    for task in (0, 1):
        cluster.wait(f"{job}_{task}")
    assert [cluster.job(f"{job}_{task}")["Restarts"] for task in (0, 1)] == ["0", "1"]
