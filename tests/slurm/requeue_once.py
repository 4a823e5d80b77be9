"""A task that asks for its job to be requeued in its first life, if it is number 1 of its array."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from clusterssl.preemption import requeue

if sys.argv[1] == "1" and "SLURM_RESTART_COUNT" not in os.environ:
    requeue("SIGUSR1")
    time.sleep(60)  # Slurm ends it
