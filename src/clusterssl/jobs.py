"""Submitting jobs through submitit, to Slurm or on this machine, and following them to their end."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from clusterssl.errors import UserError
from clusterssl.submission import Step
from clusterssl.submitit_launch import Launch, exit_code_file

SOURCE = Path(__file__).resolve().parents[1]
ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT",
}  # fmt: skip
Tell = Callable[[str], None]


class Slurm:
    """Jobs of a cluster."""

    def __init__(self, folder: Path) -> None:
        """`folder` holds logs and pickles of the jobs; %j in it stands for the job's number."""
        self.folder = folder

    def executor(self, step: Step) -> Any:
        """submitit's executor, set up for a step."""
        options = step.options
        # Until submitit listens, the signal must not kill what is still starting up.
        ignoring = f"""bash -c 'trap "" USR2; exec "$@"' - {shlex.quote(sys.executable)}"""
        executor = self.make()(self.folder, max_num_timeout=options.max_timeouts, python=ignoring)
        names = ("partition", "account", "qos", "constraint", "comment", "exclude")
        given = {name: getattr(options, name) for name in names if getattr(options, name)}
        if options.ngpus:
            given["gpus_per_node"] = options.ngpus
        if step.after:
            given["dependency"] = step.after
        executor.update_parameters(
            job_name=options.name, time=options.timeout, nodes=options.nodes, ntasks_per_node=options.tasks,
            cpus_per_task=options.cpus, mem=options.mem or f"{56 * options.tasks}G",
            signal_delay_s=options.signal_seconds, stderr_to_stdout=True,
            setup=[f"export PYTHONPATH={shlex.quote(str(SOURCE))}${{PYTHONPATH:+:$PYTHONPATH}}"],
            srun_args=["--kill-on-bad-exit=1", f"--cpus-per-task={options.cpus}"],
            additional_parameters={"requeue": True, **({"kill-on-invalid-dep": "yes"} if step.after else {})},
            **given,
        )  # fmt: skip
        return executor

    def make(self) -> Any:
        """Class of the executor."""
        return submitit().SlurmExecutor

    def submit(self, steps: Sequence[Step]) -> list[str]:
        """Numbers of the jobs, an array if there are several steps; all have the options of the first.

        Raises:
            UserError: Slurm refuses them.
        """
        executor = self.executor(steps[0])
        try:
            with contextlib.redirect_stderr(io.StringIO()), executor.batch():  # the error below says it
                jobs = [executor.submit(Launch(step.script, list(step.flags))) for step in steps]
        except submitit().core.utils.UncompletedJobError as error:
            said = [line.removeprefix("sbatch: error: ") for line in str(error).splitlines() if line.strip()]
            raise UserError(f"sbatch refused the job: {'; '.join(said)}") from error
        return [job.job_id for job in jobs]

    def log(self, job: str) -> Path:
        """What rank 0 of a job prints."""
        return Path(submitit().core.utils.JobPaths(self.folder, job_id=job, task_id=0).stdout)

    def follow(self, job: str, tell: Tell) -> int:
        """Pass on what rank 0 prints until the job has ended for good.

        Returns:
            The job's exit code; that of a shell for one that was killed.
        """
        log, state = Tail(self.log(job), tell), ""
        pause = 0.2
        while state not in ENDED:
            time.sleep(pause)
            pause = min(1.1 * pause, 5)
            before, (state, code) = state, _state(job)
            log.read()
            if state != before:
                tell(f"job {job}: {state.lower()}\n")
        time.sleep(0.2)  # what the last process wrote may come after what Slurm knows
        log.read()
        return 0 if state == "COMPLETED" else code or 1


class DryRun(Slurm):
    """Shows what would be submitted."""

    def __init__(self, folder: Path, tell: Tell) -> None:
        super().__init__(folder)
        self.tell = tell

    def make(self) -> Any:
        """The executor also where there is no Slurm."""

        class Anywhere(submitit().SlurmExecutor):  # type: ignore[misc]
            @classmethod
            def affinity(cls) -> int:
                return 1

        return Anywhere

    def submit(self, steps: Sequence[Step]) -> list[str]:
        """Show the sbatch file."""
        executor = self.executor(steps[0])
        if len(steps) > 1:
            executor.parameters["map_count"] = len(steps)
        self.tell(executor._make_submission_file_text(executor._submitit_command_str, "") + "\n")
        for step in steps:
            self.tell(f"# runs {shlex.join([str(step.script), *step.flags])}\n")
        return [steps[0].options.name.upper()] * len(steps)


class Local:
    """Jobs on this machine, one after another."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, step: Step, tell: Tell) -> int:
        """Run a step to its end; returns its exit code."""
        options = step.options
        os.environ["PYTHONPATH"] = os.pathsep.join([str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])])
        executor = submitit().LocalExecutor(self.folder, max_num_timeout=options.max_timeouts)
        executor.update_parameters(
            timeout_min=options.timeout, tasks_per_node=options.tasks, gpus_per_node=options.ngpus,
            signal_delay_s=options.signal_seconds, stderr_to_stdout=True,
        )  # fmt: skip
        job = executor.submit(Launch(step.script, list(step.flags)))
        tell(f"job {job.job_id}: {step.options.name}, log in {job.paths.stdout}\n")
        log = Tail(job.paths.stdout, tell)
        while not job.done():
            log.read()
            time.sleep(0.2)
        log.read()
        return max(self.code(job.job_id, rank) for rank in range(options.tasks))

    def code(self, job: str, rank: int) -> int:
        """Exit code that a task left behind; 1 if it was killed before it could."""
        folder = submitit().core.utils.JobPaths(self.folder, job_id=job).folder
        path = exit_code_file(folder, job, rank)
        return int(path.read_text()) if path.exists() else 1


class Tail:
    """New lines of a growing file."""

    def __init__(self, path: Path, tell: Tell) -> None:
        self.path, self.tell, self.position = path, tell, 0

    def read(self) -> None:
        """Pass on what has been added."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self.position)
            added = file.read()
        self.position += len(added)
        if added:
            self.tell(added.decode(errors="replace"))


def _state(job: str) -> tuple[str, int]:
    """State and exit code of a job, from the queue while it remembers the job, else from the accounting."""
    shown = subprocess.run(["scontrol", "--oneliner", "show", "job", job], capture_output=True, text=True)
    known = dict(word.partition("=")[::2] for word in shown.stdout.split())
    if "JobState" in known:
        return known["JobState"], _code(known.get("ExitCode", "0:0"))
    command = ["sacct", "--allocations", "--noheader", "--parsable2", "--format=State,ExitCode", "-j", job]
    state, _, code = subprocess.run(command, capture_output=True, text=True).stdout.strip().partition("|")
    return state.split(" ")[0], _code(code or "0:0")


def _code(text: str) -> int:
    """What a shell would say to Slurm's "code:signal"."""
    code, _, number = text.partition(":")
    return int(code) or (128 + int(number or 0) if int(number or 0) else 0)


def submitit() -> Any:
    """The library, if it is there.

    Raises:
        UserError: it is not.
    """
    try:
        import submitit
    except ImportError as error:
        raise UserError("submitit is not installed; pip install 'clusterssl[submitit]'") from error
    return submitit


def check_slurm() -> None:
    """Raise `UserError` where Slurm's commands are absent."""
    absent = [name for name in ("sbatch", "srun", "scontrol") if shutil.which(name) is None]
    if absent:
        raise UserError(f"{', '.join(absent)}: not on PATH; log in to a machine of the cluster, or use --local")


def check_folder(job_dir: str) -> Path:
    """The folder of jobs, made as far as it does not depend on their number.

    Raises:
        UserError: it cannot be written.
    """
    folder = Path(job_dir).expanduser().absolute()
    fixed = submitit().core.utils.JobPaths.get_first_id_independent_folder(folder)
    trial = fixed / ".trial"
    try:
        fixed.mkdir(parents=True, exist_ok=True)
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise UserError(f"--job_dir {job_dir}: cannot be written ({error.strerror}); choose a shared folder") from error
    return folder
