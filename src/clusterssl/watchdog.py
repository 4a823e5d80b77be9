"""A rank that no longer moves says where it hangs, and ends, so that the job can begin anew."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator

from clusterssl import pulse
from clusterssl.errors import EXIT_STOPPED
from clusterssl.preemption import requeue_alone

logger = logging.getLogger(__name__)

_TELLING_S = 5.0


@contextlib.contextmanager
def watching(minutes: float, rank: int) -> Iterator[None]:
    """While in the context, end this process when nothing has called `pulse.beat` for so long.

    The stacks of all threads go to stderr: the rank at fault shows where it waits, the others that they wait for it.
    In a Slurm job the requeue is asked for first; the exit code is 75.

    Args:
        minutes: of stillness; 0: watch nothing.
        rank: of this process, for the message.
    """
    done = threading.Event()
    if minutes > 0:
        pulse.beat("the start")
        threading.Thread(target=_watch, args=(60 * minutes, rank, done), daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _watch(limit: float, rank: int, done: threading.Event) -> None:
    while not done.wait(min(limit / 10, 10.0)):
        at, place = pulse.last()
        still = time.monotonic() - at
        if still > limit:
            _end(
                f"rank {rank} on {socket.gethostname()}: nothing has moved for {still / 60:.3g} minutes "
                f"(--hang_minutes {limit / 60:.3g}), last at {place}; its threads:"
            )


def _end(message: str) -> None:
    """Say it, ask for the requeue, end; nothing that hangs or fails here may keep the process alive."""
    try:
        teller = threading.Thread(target=logger.error, args=("%s", message), daemon=True)
        teller.start()
        teller.join(_TELLING_S)  # the log may lie on the file system that hangs
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        requeue_alone()
    finally:
        os._exit(EXIT_STOPPED)
