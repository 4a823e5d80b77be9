"""The part of a submitit job that runs on the cluster: a script, its place among the ranks, and its way back.

submitit pickles a `Launch`, runs it in every task, and asks its `checkpoint()` what to run after a requeue. The stop
itself is that of clusterssl.preemption: ranks agree on a step, save, and only then rank 0 asks submitit to requeue.
"""

from __future__ import annotations

import logging
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

from clusterssl.errors import EXIT_STOPPED

logger = logging.getLogger(__name__)


class Launch:
    """A script and its flags, as a submitit job runs them."""

    def __init__(self, script: Path, flags: list[str]) -> None:
        """The script runs as `python SCRIPT FLAGS` would; paths are those of the folder the job is submitted from."""
        self.script, self.flags = str(script), list(flags)
        self.requeued: int | None = None

    def __call__(self) -> int:
        """Run the script in this task.

        Returns:
            0.

        Raises:
            SystemExit: with the script's exit code, unless that is 0; with submitit's after a requeue.
        """
        import submitit

        from clusterssl import preemption

        job = submitit.JobEnvironment()
        take_place(job)
        theirs = signal.getsignal(getattr(signal, f"SIG{job.USR_SIG}"))
        preemption.requeue_with(lambda: self.requeue(theirs, job.cluster))
        kept = exit_code_file(job.paths.folder, job.job_id, job.global_rank)
        kept.unlink(missing_ok=True)
        code = self.run()
        kept.write_text(f"{code}\n")
        if code == EXIT_STOPPED and self.requeued is not None:
            raise SystemExit(self.requeued)
        if code:
            raise SystemExit(code)
        return 0

    def run(self) -> int:
        """Exit code of the script."""
        sys.argv = [self.script, *self.flags]
        sys.path.insert(0, str(Path(self.script).parent))
        try:
            runpy.run_path(self.script, run_name="__main__")
        except SystemExit as ended:
            if isinstance(ended.code, str):
                sys.stderr.write(f"{ended.code}\n")
            return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        return 0

    def requeue(self, theirs: Any, cluster: str) -> None:
        """Do in rank 0 what submitit does on its signal: keep what `checkpoint()` returns, requeue, end.

        The end waits: the other ranks have to learn of it first.
        """
        import submitit

        from clusterssl import preemption

        refusal = preemption.why_not_requeued() if cluster == "slurm" else ""
        if refusal:
            logger.info("not requeued: %s", refusal)
            return
        try:
            theirs(signal.SIGUSR2, None)
        except SystemExit as ended:
            self.requeued = ended.code if isinstance(ended.code, int) else 1
        except submitit.core.utils.UncompletedJobError as error:  # its limit of timeouts
            logger.warning("not requeued: %s", error)

    def checkpoint(self) -> Any:
        """What submitit runs after a requeue: the same; the run directory knows how far it came."""
        import submitit

        return submitit.helpers.DelayedSubmission(Launch(Path(self.script), self.flags))


def exit_code_file(folder: Path, job: str, rank: int) -> Path:
    """Where a task leaves its exit code, which nothing else keeps outside of Slurm."""
    return folder / f"{job}_{rank}_exit_code"


def take_place(job: Any) -> None:
    """Tell this process its rank where submitit started the tasks itself, on one machine; Slurm's know theirs."""
    if job.cluster == "slurm" or job.num_tasks == 1:
        return
    number = int(job.raw_job_id)
    os.environ.update(
        RANK=str(job.global_rank), WORLD_SIZE=str(job.num_tasks), LOCAL_RANK=str(job.local_rank),
        MASTER_ADDR="localhost", MASTER_PORT=str(10000 + number % 20000),
    )  # fmt: skip
