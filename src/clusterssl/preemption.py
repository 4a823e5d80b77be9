"""Being asked to stop: signals only set a flag, the training loop acts on it at a step boundary."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
from types import FrameType

from clusterssl import dist

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Remembers that this process was asked to stop; installed for the duration of a `with` block.

    SIGTERM, SIGUSR1, SIGUSR2 and the first Ctrl-C ask for a stop at the next step boundary, with a checkpoint. A second
    Ctrl-C ends at once. Handlers do nothing else: saving inside a handler could tear a save that is under way.
    """

    def __init__(self) -> None:
        self.received = ""
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (*STOP_SIGNALS, signal.SIGINT):
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name


def requeue(received: str) -> None:
    """Rank 0 asks Slurm to put this job back into its queue, while the other ranks wait; nothing outside a Slurm step.

    They wait because a rank that leaves early may make srun kill the step, and with it the request. After a Ctrl-C
    nobody wants the job back.
    """
    wanted = dist.broadcast_object(received != "SIGINT" and "SLURM_STEP_ID" in os.environ)
    if wanted and dist.rank() == 0:
        _ask_slurm(os.environ["SLURM_JOB_ID"])
    dist.barrier()


def _ask_slurm(job: str) -> None:
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("Slurm did not requeue job %s: %s", job, error)
    else:
        logger.info("Slurm requeues job %s", job)
