"""Images for methods under test, given as tensors instead of read by a loader."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Crops = list[Tensor]


@dataclass
class GivenFeed:
    """Has the sizes and passes of `clusterssl.feed.Feed` that methods use."""

    steps_per_epoch: int = 100
    step_images: int = 1
    num_images: int = 0
    global_batch: int = 0
    seed: int = 0
    device: torch.device = torch.device("cpu")
    labels: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    batches: list[tuple[Crops, Tensor]] = field(default_factory=list)
    """what `augmented` gives in every epoch"""
    images: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """what `plain` gives"""

    def autocast(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def augmented(self, epoch: int) -> Iterator[tuple[Crops, Tensor]]:
        return iter(self.batches)

    def plain(self, batch_size: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.images)
