"""Being asked to stop: signals only set a flag, the training loop acts on it at a step boundary."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
from types import FrameType

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


def requeue() -> bool:
    """Ask Slurm to put this job back into its queue; False outside a Slurm step or when Slurm declines."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or "SLURM_STEP_ID" not in os.environ:
        return False
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("Slurm did not requeue job %s: %s", job, error)
        return False
    logger.info("Slurm requeues job %s", job)
    return True
