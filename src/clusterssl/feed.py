"""The images of a run, for methods that look at all of them between two steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from clusterssl import dist, pulse
from clusterssl.data import Augment, BadImages, Batch, Loader, eval_batches, resize_for
from clusterssl.dist import World
from clusterssl.errors import Stopped, UserError
from clusterssl.method import Crops
from clusterssl.precision import Precision
from clusterssl.preemption import StopRequest, requeue
from clusterssl.profiling import unprofiled

logger = logging.getLogger(__name__)

T = TypeVar("T")

_SECONDS_BETWEEN_LINES = 10.0


@dataclass
class Feed:
    """Passes over the images of a run, each rank over its share.

    Signals and unreadable images end a pass on all ranks together, by `Stopped` or `UserError`; so a method changes its
    state only when a pass is complete. The body of a loop over a pass may hold the collectives of a forward pass and no
    others.
    """

    loader: Loader
    augment: Augment
    world: World
    layout: torch.memory_format
    precision: Precision
    ledger: BadImages
    request: StopRequest = field(default_factory=StopRequest)
    """the one that `fit` listens with"""
    before_stop: Callable[[], None] = lambda: None
    """called on all ranks together before a run is stopped between two steps"""
    part: Callable[[str], AbstractContextManager[Any]] = unprofiled
    """context of a named part of a step, see `profiling`"""
    _copies: Any = None
    """the GPU's stream for copies, once there is one"""

    @property
    def num_images(self) -> int:
        """Images of the dataset."""
        return len(self.loader.source)

    @property
    def labels(self) -> Tensor:
        """Class of every image, int64 [N], -1 where unknown; for reports, never for training."""
        return torch.as_tensor(self.loader.source.labels)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of an epoch."""
        return self.loader.batches_per_epoch

    @property
    def step_images(self) -> int:
        """Images of this rank in one optimiser step."""
        return self.loader.global_batch // self.world.size

    @property
    def global_batch(self) -> int:
        """Images of one optimiser step over all ranks."""
        return self.loader.global_batch

    @property
    def device(self) -> torch.device:
        """Where the images are delivered."""
        return self.world.device

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return self.loader.seed

    def autocast(self) -> AbstractContextManager[Any]:
        """Context of forward passes outside `loss`."""
        return self.precision.autocast(self.world.device)

    def crops(self, batch: Batch) -> Crops:
        """The augmented crops of a batch, on the device."""
        with self.part("copy"):
            moved = self._moved(batch.crops)
        with self.part("augmentation"):
            crops = self.augment(moved, batch.params, self.world.device)
            return [crop.contiguous(memory_format=self.layout) for crop in crops]

    def _moved(self, crops: Crops) -> Crops:
        """Crops on the device; a GPU copies them while it still computes the step before."""
        if self.world.device.type != "cuda":
            return [crop.to(self.world.device, non_blocking=True) for crop in crops]
        computes = torch.cuda.current_stream(self.world.device)
        if self._copies is None:
            self._copies = torch.cuda.Stream(self.world.device)
        with torch.cuda.stream(self._copies):
            moved = [crop.to(self.world.device, non_blocking=True) for crop in crops]
        computes.wait_stream(self._copies)
        for crop in moved:
            crop.record_stream(computes)
        return moved

    def augmented(self, epoch: int) -> Iterator[tuple[Crops, Tensor]]:
        """One pass over this rank's (micro-)batches in the shuffled order of `epoch`, with its crops and augmentation.

        Yields:
            V crops B x 3 x h x w and int64 [B] dataset positions, on the device.
        """
        loader = self.loader.another()  # an epoch may be under way in the first one
        steps = (step for step in loader.epoch(epoch))
        batches = (batch for step in steps for batch in self._entered(step))
        for batch in self._together(batches, loader.batches_per_epoch * loader.accumulate):
            yield self.crops(batch), batch.index.to(self.device)

    def plain(self, batch_size: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over the centre crops of this rank's `dist.share` of the images, in dataset order.

        Args:
            batch_size: images at a time; those of a training batch when None.

        Yields:
            Normalised images B x 3 x h x w of the first crop's size and int64 [B] dataset positions, on the device.
        """
        first, end = dist.share(self.num_images)
        size, batch = self.loader.multicrop.sizes[0], batch_size or self.loader.batch_size
        most = -(-self.num_images // self.world.size)
        batches = eval_batches(
            self.loader.source, range(first, end), image_size=size, resize=resize_for(size), batch_size=batch,
            workers=self.loader.workers, device=self.device, ledger=self.ledger, mean=self.augment.mean,
            std=self.augment.std,
        )  # fmt: skip
        for images, _, index in self._together(batches, -(-most // batch)):
            yield images.contiguous(memory_format=self.layout), index.to(self.device)

    def _entered(self, batches: list[Batch]) -> list[Batch]:
        for batch in batches:
            self.ledger.add(batch.bad)
        return batches

    def _together(self, batches: Iterator[T], count: int) -> Iterator[T]:
        """Hand out `count` batches (fewer where a rank has fewer), and end on all ranks at once when any must."""
        agreement = dist.Agreement(2)
        problem: UserError | None = None
        last, done = None, 0
        began = shown = time.monotonic()
        for done in range(1, count + 1):
            batch = None
            try:
                batch = next(batches, None)
            except UserError as error:
                problem, batch = error, last  # others go on until they know, and may wait for this rank
            if done == 1:
                dist.raise_together(problem)  # it has nothing to go on with
            self._obey(
                agreement.exchange([int(bool(self.request.received)), int(problem is not None)]), agreement, problem
            )
            pulse.beat(f"batch {done} of {count} of a pass over all images")
            if batch is not None:
                last = batch
                yield batch
            if time.monotonic() - shown > _SECONDS_BETWEEN_LINES and dist.rank() == 0:
                shown = time.monotonic()
                logger.info("pass over the images: %d of %d batches, %.0f s", done, count, shown - began)
        self._obey(agreement.finish(), agreement, problem)

    def _obey(self, agreed: list[int], agreement: dist.Agreement, problem: UserError | None) -> None:
        stop, failed = agreed
        if failed:
            agreement.finish()
            dist.raise_together(problem)
        if stop:
            agreement.finish()
            self._stop()

    def heed(self) -> None:
        """End the run on all ranks together if any was asked to stop; a collective call, see `pulse.tick`."""
        if int(dist.all_reduce_(torch.tensor(int(bool(self.request.received))), "max")):
            self._stop()

    def _stop(self) -> NoReturn:
        self.before_stop()
        requeue(self.request.received)
        name = self.request.received or "a signal to another rank"
        raise Stopped(f"stopped by {name} between two steps; the same command goes on from the checkpoint")
