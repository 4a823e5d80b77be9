"""Training by optimiser steps in a run directory: checkpoints, resuming at the exact step, stopping on request."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from clusterssl import dist
from clusterssl.dist import World
from clusterssl.errors import Stopped, UserError
from clusterssl.evals.classifier import epoch_order, rows_of_steps
from clusterssl.preemption import StopRequest, requeue
from clusterssl.run import Run

logger = logging.getLogger(__name__)

B = TypeVar("B")

_SECONDS_BETWEEN_LINES = 10.0
_STEPS_BETWEEN_AGREEMENTS = 10
_IMMATERIAL = """
    data_path vocdir cocodir pretrained arch stem image_size workers batch_size dump_path device dist_url world_size
    rank local_rank checkpoint_every tensorboard wandb
"""
FREE = frozenset(_IMMATERIAL.split())
"""flags that may differ when a run is resumed: the network, the global batch and the images are compared instead"""


def steps_from(
    start: int, size: int, batch_size: int, seed: int, *, whole: bool = False
) -> Iterator[tuple[int, Tensor, int]]:  # fmt: skip
    """Endless training steps over random orders of all images, from step `start` on.

    Args:
        start: steps done before.
        size: images of an epoch.
        batch_size: images of this rank and step.
        seed: of the orders.
        whole: leave out what is left of an epoch after its last whole step, so that no rank is without images.

    Yields:
        Epoch, this rank's dataset positions int64 (none where fewer images than ranks are left), images of all ranks.
    """
    together = batch_size * dist.size()
    per_epoch = max(1, size // together) if whole else -(-size // together)
    epoch, skip = divmod(start, per_epoch)
    while True:
        order = epoch_order(size, seed, epoch)[: per_epoch * together]
        for rows, total in list(rows_of_steps(order, batch_size))[skip:]:
            yield epoch, rows, total
        epoch, skip = epoch + 1, 0


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Sum gradients over the ranks; one that computed none counts as zero."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce_(parameter.grad)


class StepRun:
    """One network on its way through its optimiser steps."""

    def __init__(self, name: str, folder: str, world: World, mirrors: Sequence[str] = ()) -> None:
        """Name the kind of evaluation, the directory, where records are copied; nothing is written before `open`."""
        self.name, self.run, self.world = name, Run(folder, world, mirrors), world

    def open(self, flags: dict[str, Any], facts: dict[str, Any], free: frozenset[str] = FREE) -> None:
        """Check that the directory is this run's or free, and record this start.

        Raises:
            UserError: it holds something else.
        """
        self.run.open(self.name, flags, facts, frozenset(flags) - free)

    def fit(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, total: int, batches: Callable[[int], Iterator[B]],
        step: Callable[[int, B], Tensor], *, save_every: int,
    ) -> None:  # fmt: skip
        """Train from the checkpoint, if there is one, to the last step.

        Args:
            model: what is trained.
            optimizer: of its parameters.
            total: number of steps.
            batches: from the number of steps done to the batches of those that follow.
            step: does one step, given its number and batch; returns the mean loss over the images of all ranks.
            save_every: steps between checkpoints.

        Raises:
            UserError: a loss that is not finite, or a directory that cannot be written.
            Stopped: a signal asked for it; the step under way was finished and saved.
        """
        done = self._resume(model, optimizer)
        self.run.begin(done)
        losses, shown, shown_at = [], time.monotonic(), done
        stream = batches(done) if done < total else iter(())
        with StopRequest() as request:
            while done < total:
                losses.append(step(done, next(stream)).detach())
                done += 1
                now, last = time.monotonic(), done == total
                stop = self._asked(request, done) and not last
                if last or stop or done % save_every == 0 or self._agreed(now - shown > _SECONDS_BETWEEN_LINES, done):
                    self._tell(done, total, losses, (done - shown_at) / max(now - shown, 1e-9), optimizer)
                    losses, shown, shown_at = [], now, done
                if last or stop or done % save_every == 0:
                    self._save(model, optimizer, done)
                if stop:
                    self._stop(request, done, total)
        self.run.close()

    def _agreed(self, mine: bool, done: int) -> bool:
        """What rank 0's clock says, asked now and then."""
        return done % _STEPS_BETWEEN_AGREEMENTS == 0 and dist.broadcast_object(mine)

    def _asked(self, request: StopRequest, done: int) -> bool:
        if done % _STEPS_BETWEEN_AGREEMENTS and dist.size() > 1:
            return False
        return bool(dist.all_reduce_(torch.tensor(int(bool(request.received))), "max"))

    def _tell(
        self, done: int, total: int, losses: list[Tensor], speed: float, optimizer: torch.optim.Optimizer
    ) -> None:
        loss, rate = float(torch.stack(losses).double().mean()), float(optimizer.param_groups[0]["lr"])
        if not math.isfinite(loss):
            raise UserError(f"the loss was not finite before step {done}; {self._kept()}, lower --lr")
        self.run.log({"step": done, "loss": loss, "lr": rate, "steps_per_s": round(speed, 3)})
        logger.info("step %d of %d, lr %.3g, loss %.4f, %.2f steps/s", done, total, rate, loss, speed)

    def _save(self, model: nn.Module, optimizer: torch.optim.Optimizer, done: int) -> None:
        if not all(bool(tensor.isfinite().all()) for tensor in model.parameters()):
            raise UserError(f"the weights were not finite after step {done}; {self._kept()}, lower --lr")
        state = {"epoch": 0, "state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
        self.run.save(state, {}, step=done)

    def _kept(self) -> str:
        return "the last checkpoint is kept" if self.run.has_checkpoint() else "start again"

    def _resume(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        state = self.run.load()
        if state is None:
            return 0
        model.load_state_dict(state["state_dict"])
        optimizer.load_state_dict(state["optimizer"])
        logger.info("resuming after step %d", state["step"])
        return int(state["step"])

    def _stop(self, request: StopRequest, done: int, total: int) -> None:
        requeue(request.received)
        name = request.received or "a signal to another rank"
        raise Stopped(f"stopped by {name} after step {done} of {total}; the same command continues there")
