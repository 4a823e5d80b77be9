"""Learning rates of the published evaluations."""

from __future__ import annotations

import math
from collections.abc import Sequence


def epoch_lr(
    epoch: int, *, scheduler_type: str, lr: float, epochs: int, decay_epochs: Sequence[int] = (), gamma: float = 0.1,
    final_lr: float = 0.0,
) -> float:  # fmt: skip
    """Learning rate in force during an epoch, counted from 0.

    "cosine": final_lr + (lr - final_lr)(1 + cos(pi epoch / epochs)) / 2. "step": lr times gamma for each of
    `decay_epochs` reached.
    """
    if scheduler_type == "cosine":
        return final_lr + (lr - final_lr) * (1 + math.cos(math.pi * epoch / epochs)) / 2
    return lr * gamma ** sum(epoch >= decay for decay in decay_epochs)


def step_lr(step: int, *, lr: float, wd: float) -> float:
    """Learning rate of a step, counted from 0 over all epochs, of DeepCluster's linear evaluation.

    lr / sqrt(1 + lr wd step).
    """
    return lr / math.sqrt(1 + lr * wd * step)
