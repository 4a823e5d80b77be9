"""Being asked to stop: signals only set a flag, the training loop acts on it at a step boundary."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from clusterssl import dist, pulse
from clusterssl.errors import DataGone, Stopped

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_ASKED = "asked to stop at the start"
"""key on the store of the ranks"""


class StopRequest:
    """Remembers that this process was asked to stop; installed for the duration of a `with` block.

    SIGTERM, SIGUSR1, SIGUSR2 and the first Ctrl-C ask for a stop at the next step boundary, with a checkpoint. A second
    Ctrl-C ends at once. Handlers do nothing else: saving inside a handler could tear a save that is under way. When the
    block ends with exit code 75, by `Stopped` or `DataGone`, further requests are ignored: they must not change it.
    """

    def __init__(self, signals: Sequence[signal.Signals] = (*STOP_SIGNALS, signal.SIGINT)) -> None:
        self.received, self._signals = "", signals
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in self._signals:
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        stopped = kind is not None and issubclass(kind, (Stopped, DataGone))
        for number, handler in self._before.items():
            ignored = stopped and number in STOP_SIGNALS
            signal.signal(number, signal.SIG_IGN if ignored else handler)  # type: ignore[arg-type]

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name


@contextmanager
def starting() -> Iterator[None]:
    """What comes before the training loop: a request to stop any rank ends all at a `pulse.poll`, or at the end.

    Ctrl-C ends at once, as there is nothing to save. Its end is a collective call.

    Raises:
        Stopped: a signal asked for it; in a Slurm job so was the requeue.
    """
    with StopRequest(STOP_SIGNALS) as request:
        try:
            with pulse.polled(lambda: _end_if_asked(request)):
                yield
            dist.raise_together(_stopped(request) if request.received else None)
        except Stopped:
            requeue(request.received)
            raise


def _end_if_asked(request: StopRequest) -> None:
    """Raise `Stopped` on this rank if any was asked to; no collective call."""
    store = dist.store()
    if request.received:
        store.set(_ASKED, "")
    if request.received or store.check([_ASKED]):
        raise _stopped(request)


def _stopped(request: StopRequest) -> Stopped:
    name = request.received or "a signal to another rank"
    return Stopped(f"stopped by {name} before the first step of this start; the same command starts again")


def requeue(received: str) -> None:
    """Rank 0 asks Slurm to put this job back into its queue, while the other ranks wait; nothing outside a Slurm job.

    They wait because a rank that leaves early may make srun kill the step, and with it the request. After a Ctrl-C
    nobody wants the job back.
    """
    wanted = dist.broadcast_object(received != "SIGINT" and _in_job())
    if wanted and dist.rank() == 0:
        try:
            _ask()
        except (OSError, subprocess.SubprocessError) as error:
            logger.warning("%s", _refused(error))
    dist.barrier()


def requeue_alone() -> None:
    """As `requeue`, by a rank that cannot count on the others; launchers have ways for rank 0 only, Slurm for all."""
    if not _in_job():
        return
    try:
        (_ask_slurm if "SLURM_JOB_ID" in os.environ else _ask)()
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("%s", _refused(error))


def requeue_with(ask: Callable[[], None]) -> None:
    """From now on `requeue` calls `ask` in rank 0 instead of Slurm: a launcher has its own way."""
    global _ask
    _ask = ask


def _refused(error: Exception) -> str:
    return f"Slurm did not requeue this job: {str(getattr(error, 'stderr', '') or error).strip()}"


def _in_job() -> bool:
    """Whether Slurm, or the launcher that `requeue_with` knows of, runs this process and not only its shell."""
    env = os.environ
    return _ask is not _ask_slurm or "SLURM_STEP_ID" in env or env.get("ENVIRONMENT") == "BATCH"


def why_not_requeued() -> str:
    """Why this Slurm job must stay as it is; empty if it may be requeued.

    Slurm would requeue cancelled jobs, too. A job that met its time limit is ending like a cancelled one, but with a
    reason; one that is preempted, or whose node failed, comes back by itself once it is ending.

    Raises:
        OSError, subprocess.SubprocessError: Slurm does not answer.
    """
    shown = scontrol("--oneliner", "show", "job", job_number())
    known = dict(word.partition("=")[::2] for word in shown.split())
    state = known.get("JobState", "unknown")
    if known.get("BatchFlag") == "0":
        return "it is interactive"
    return "" if state == "RUNNING" or known.get("Reason") == "TimeLimit" else f"its state is {state}"


def job_number() -> str:
    """This job as Slurm calls it; the plain number of an array's last task is that of the whole array, too."""
    env = os.environ
    if "SLURM_ARRAY_TASK_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env["SLURM_JOB_ID"]


def _ask_slurm() -> None:
    refusal = why_not_requeued()
    if refusal:
        logger.info("job %s is not requeued: %s", job_number(), refusal)
        return
    scontrol("requeue", job_number())
    logger.info("Slurm requeues job %s", job_number())


def scontrol(*words: str) -> str:
    """What Slurm's scontrol prints.

    Raises:
        OSError, subprocess.SubprocessError: Slurm does not answer.
    """
    done = subprocess.run(["scontrol", *words], check=True, capture_output=True, text=True, timeout=60)
    return done.stdout


_ask: Callable[[], None] = _ask_slurm
