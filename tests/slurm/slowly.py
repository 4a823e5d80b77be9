"""Runs a training with a pause after each step, so that a test can act before it is over: slowly.py SCRIPT FLAGS."""

from __future__ import annotations

import runpy
import sys
import time
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook


def pause(*step: Any) -> None:
    time.sleep(0.05)


if __name__ == "__main__":
    register_optimizer_step_post_hook(pause)
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
