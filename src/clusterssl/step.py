"""One optimiser step: forward and backward passes of its (micro-)batches, then the update."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from clusterssl.data import Batch
from clusterssl.method import Crops
from clusterssl.parts import Parts


class Step:
    """Steps of a run, in any order; knows nothing of epochs, logs and files."""

    def __init__(self, parts: Parts, seen: Callable[[Batch], None] = lambda batch: None) -> None:
        """Args: what the run consists of; called with each (micro-)batch after its backward pass."""
        self.parts, self.feed, self.seen = parts, parts.feed, seen
        parts.method.optimizer = parts.optimizer
        self.scaler = self.feed.precision.scaler(parts.world.device)

    def __call__(self, step: int, batches: list[Batch]) -> Tensor:
        """Learn from the images of step `step`, counted from 0; the mean loss, on the device and not waited for."""
        parts, part = self.parts, self.feed.part
        rate = parts.schedule.learning_rate(step)
        for group in parts.optimizer.param_groups:
            group["lr"] = rate
        if len(batches) > 1:
            with self.feed.autocast(), part("assignment"):
                parts.method.begin_step(self.shown(step, batches))
        step_loss = torch.zeros((), device=parts.world.device)
        for number, batch in enumerate(batches):
            self.seed(step, number)
            with self.no_sync(number < len(batches) - 1):
                with self.feed.autocast():
                    crops, index = self.feed.crops(batch), self.index(batch)
                    with part("assignment"):
                        loss = parts.method.loss(crops, index) / len(batches)
                del crops
                with part("backward"):
                    self.scaler.scale(loss).backward()
            step_loss = step_loss + loss.detach()
            self.seen(batch)
        with part("optimiser"):
            parts.method.before_step(step)
            self.scaler.step(parts.optimizer)
            self.scaler.update()
            parts.optimizer.zero_grad(set_to_none=True)
        return step_loss

    def shown(self, step: int, batches: list[Batch]) -> Iterator[tuple[Crops, Tensor]]:
        """The micro-batches of a step ahead of their losses, with the dropout masks that they will meet there."""
        for number, batch in enumerate(batches):
            self.seed(step, number)
            yield self.feed.crops(batch), self.index(batch)

    def index(self, batch: Batch) -> Tensor:
        """Dataset positions of a batch, on the device."""
        return batch.index.to(self.parts.world.device, non_blocking=True)

    def seed(self, step: int, micro_batch: int = 0) -> None:
        """Make what torch draws from here on depend on step, micro-batch and rank, so that a resumed run repeats it."""
        place = (self.parts.schedule.seed * 1_000_003 + step) * 2**10 + micro_batch
        torch.manual_seed((place * 2**16 + self.parts.world.rank) % 2**63)

    def no_sync(self, more: bool) -> AbstractContextManager[Any]:
        """Ranks exchange gradients only in the last backward pass of a step."""
        model = self.parts.model
        return model.no_sync() if more and isinstance(model, DistributedDataParallel) else nullcontext()
