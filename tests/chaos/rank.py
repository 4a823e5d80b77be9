"""One rank of a run in a session of its own, so that what outlives it is found: rank.py SCRIPT FLAGS.

CHAOS_STUCK=RANK:STEPS:FILE lets a rank hang after so many steps, unless FILE is there, which it makes.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook


def hang_after(steps: int, once: Path) -> None:
    """Let the optimiser's step never come back."""
    done = 0

    def wait_for_nothing(*step: Any) -> None:
        nonlocal done
        done += 1
        if done == steps and not once.exists():
            once.touch()
            while True:
                time.sleep(0.1)

    register_optimizer_step_post_hook(wait_for_nothing)


if __name__ == "__main__":
    os.setsid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no rank outlives the test
    faulthandler.register(signal.SIGQUIT)  # the harness asks a rank that does not end where it is
    rank, steps, once = os.environ.get("CHAOS_STUCK", "-1:0:").split(":")
    if rank == os.environ.get("RANK"):
        hang_after(int(steps), Path(once))
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
