"""Processes of this package that a run starts beside itself."""

from __future__ import annotations

import os
from pathlib import Path


def environment() -> dict[str, str]:
    """Variables of a process that finds this package, installed or not, and sees no GPU."""
    paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
