"""What a run consists of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from clusterssl.dist import World
from clusterssl.feed import Feed
from clusterssl.method import Method
from clusterssl.run import Run


@dataclass(frozen=True)
class Schedule:
    """How long `fit` trains and when it looks up from training."""

    epochs: int
    learning_rate: Callable[[int], float]
    """of an optimiser step, counted from 0"""
    seed: int
    log_freq: int = 10
    """steps between two records in metrics.jsonl"""
    checkpoint_freq: int = 25
    """epochs between two kept checkpoints"""
    checkpoint_minutes: float = 10.0
    """0: after every step"""
    stop_on_collapse: bool = False
    hang_minutes: float = 0.0
    """of stillness after which a rank ends itself; 0: never"""
    profile: int = 0
    """steps whose time is taken apart"""


@dataclass
class Parts:
    """Everything a run consists of; `fit` moves it through time."""

    method: Method
    model: nn.Module
    optimizer: torch.optim.Optimizer
    feed: Feed
    schedule: Schedule
    run: Run
    world: World
    record: dict[str, Any]
    """what a reader of the checkpoint must know of the model: arch, stem, size_crops, heads"""
