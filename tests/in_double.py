"""Runs a training in float64, with the images of every step written down: in_double.py STEPS IMAGES SCRIPT FLAGS.

After STEPS optimiser steps of this process (0: never) the last rank sends itself SIGTERM. IMAGES is a file to which
each rank, with its number as ending, appends the dataset positions of each of its steps.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from clusterssl.data import Batch
from clusterssl.feed import Feed


def as_the_weights(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Images arrive in float32; only the first convolution meets them."""
    return (inputs[0].to(module.weight.dtype),) if isinstance(module, nn.Conv2d) else None


class Diary:
    """Remembers the last batch, and writes it down when it was learned."""

    def __init__(self, steps: int, images: str) -> None:
        rank, ranks = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
        self.path, self.steps, self.signals = Path(f"{images}.{rank}"), steps, rank == ranks - 1
        self.last, self.crops = "", Feed.crops

    def entered(self, feed: Feed, batch: Batch) -> list[Tensor]:
        self.last = " ".join(map(str, batch.index.tolist()))
        return self.crops(feed, batch)

    def learned(self, *_: Any) -> None:
        with self.path.open("a") as file:
            file.write(self.last + "\n")
        self.steps -= 1
        if self.steps == 0 and self.signals:
            os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    diary = Diary(int(sys.argv[1]), sys.argv[2])
    Feed.crops = lambda feed, batch: diary.entered(feed, batch)  # type: ignore[method-assign]
    register_optimizer_step_post_hook(diary.learned)
    register_module_forward_pre_hook(as_the_weights)
    torch.set_default_dtype(torch.float64)
    sys.argv = sys.argv[3:]
    runpy.run_path(sys.argv[0], run_name="__main__")
