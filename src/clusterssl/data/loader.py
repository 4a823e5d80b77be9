"""From a source to batches: workers, epochs that can begin at any step."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from clusterssl import dist
from clusterssl.data.boxes import buffer_bytes
from clusterssl.data.cache import CachedFiles, CachedSource
from clusterssl.data.dataset import Batch, Key, MultiCropDataset, Shipped
from clusterssl.data.devicedecode import DeviceDecode, RawDataset
from clusterssl.data.multicrop import MultiCrop
from clusterssl.data.packed import PackedSource
from clusterssl.data.sampler import PositionSampler
from clusterssl.data.slots import Slots
from clusterssl.data.source import FileSource, Source
from clusterssl.data.subset import ClassSubset
from clusterssl.errors import DataGone, UserError

if TYPE_CHECKING:
    from clusterssl.data.resident import Resident


_PREFETCH = 2
"""batches that wait for each worker's turn"""


@contextmanager
def signals_held() -> Iterator[None]:
    """Holds back the signals of a run: processes begun meanwhile cannot die of one before `quiet_worker` is reached."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    ours = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ours)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def quiet_worker(_: int) -> None:
    """Worker set-up: signals sent to the run are the main process's business; one thread for computing."""
    for name in ("SIGINT", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, daemon=True).start()
    torch.set_num_threads(1)


def _obey_parent() -> None:
    """Ends the worker on SIGTERM of its parent, which would wait for ever otherwise; all others are ignored."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


class Failure(str):
    """Message of a UserError on its way out of a worker, where an exception would arrive with its whole trace."""

    @staticmethod
    def of(error: UserError) -> Failure:
        """What `checked` raises it from."""
        return (FailureOutOfReach if isinstance(error, DataGone) else Failure)(error)


class FailureOutOfReach(Failure):
    """That of a DataGone."""


class Guarded(Dataset[Any]):
    """Hands lists of keys to a dataset and turns its UserErrors into `Failure`s."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: Sequence[Any]) -> Any:
        try:
            return self.dataset.__getitems__(keys)
        except UserError as error:
            return Failure.of(error)


def same(item: Any) -> Any:
    """Collation of what is a batch already."""
    return item


def ship(item: Any, slots: Slots) -> Any:
    """Collation of a `Batch`, where there is one."""
    return Shipped.of(item, slots) if isinstance(item, Batch) else item


def checked(batches: Any) -> Iterator[Any]:
    """Passes batches on, unpacks those that were shipped, and raises what workers reported."""
    with signals_held():
        arriving = iter(batches)
    for batch in arriving:
        if isinstance(batch, Failure):
            raise (DataGone if isinstance(batch, FailureOutOfReach) else UserError)(str(batch))
        yield batch.batch() if isinstance(batch, Shipped) else batch


def _at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise UserError(f"--{name} {value}: must be at least {least}")


class Loader:
    """Multi-crop batches of one rank, epoch by epoch."""

    def __init__(
        self,
        source: Source,
        multicrop: MultiCrop,
        *,
        batch_size: int,
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        workers: int = 0,
        pin_memory: bool = False,
        images_per_epoch: int | None = None,
        persistent: bool = True,
        resident: Resident | None = None,
        decode: DeviceDecode | None = None,
    ) -> None:
        """Prepares the workers.

        Args:
            source: images.
            multicrop: crops to take of each.
            batch_size: images of one micro-batch on one rank.
            accumulate: micro-batches of one optimizer step.
            rank, world_size: place among the ranks.
            seed: of order, crops and augmentation.
            workers: worker processes; 0: load in this process.
            pin_memory: deliver in pinned memory, for copies to a GPU that do not wait.
            images_per_epoch: images that an epoch visits; those of the dataset when None.
            persistent: keep the workers from one epoch to the next.
            resident: the same images on the training device, to be cropped there without workers.
            decode: decodes, crops and resizes on the training device what the workers only read.

        Raises:
            UserError: the global batch is larger than the dataset, or a number is out of range.
        """
        _at_least(1, batch_size=batch_size, accumulate=accumulate)
        _at_least(0, workers=workers)
        self._again = partial(
            Loader, source, multicrop, batch_size=batch_size, accumulate=accumulate, rank=rank, world_size=world_size,
            seed=seed, workers=workers, pin_memory=pin_memory, persistent=False,
            resident=resident, decode=decode,
        )  # fmt: skip
        self.batch_size, self.accumulate, self.seed, self.workers = batch_size, accumulate, seed, workers
        self.sampler = PositionSampler(
            len(source), batch_size, accumulate=accumulate, rank=rank, world_size=world_size, seed=seed,
            images_per_epoch=images_per_epoch,
        )  # fmt: skip
        self._require_a_step(world_size)
        self.source, self.multicrop, self.resident, self.decode = source, multicrop, resident, decode
        spare = 1 + -(-(accumulate + 1) // max(workers, 1))  # of what is held here, beyond what waits
        self._slots = Slots(workers, _PREFETCH + spare, buffer_bytes(batch_size, multicrop.sizes))
        self._loader = self._with_workers(pin_memory, persistent)

    def _require_a_step(self, ranks: int) -> None:
        if self.sampler.steps == 0:
            raise UserError(
                f"a global batch of {self.global_batch} images ({self.batch_size} x {self.accumulate} micro-batches x "
                f"{ranks} ranks) is larger than an epoch of the dataset ({self.sampler.images} images): lower "
                "--batch_size or --accumulate"
            )

    def _with_workers(self, pin_memory: bool, persistent: bool) -> DataLoader[Any]:
        """What workers cut, or only read where the device decodes."""
        cut = MultiCropDataset(self.source, self.multicrop, self.seed, self._slots)
        return DataLoader(
            Guarded(RawDataset(self.source) if self.decode else cut),
            batch_sampler=self.sampler,
            collate_fn=partial(ship, slots=self._slots),
            prefetch_factor=_PREFETCH if self.workers > 0 else None,
            num_workers=self.workers,
            pin_memory=pin_memory,
            persistent_workers=persistent and self.workers > 0,
            worker_init_fn=quiet_worker,
            generator=torch.Generator(),  # else every epoch would draw from the global one
        )

    @property
    def batches_per_epoch(self) -> int:
        """Optimizer steps of a whole epoch."""
        return self.sampler.steps

    @property
    def global_batch(self) -> int:
        """Images of one optimizer step over all ranks."""
        return self.sampler.global_batch

    def faster(self) -> str:
        """Which flag would make loading faster, in one line."""
        if self.resident is not None:
            return "the crops are cut on the training device: take fewer or smaller ones (--nmb_crops, --size_crops)"
        if self.decode is not None:
            return (
                "--decode gpu decodes and crops between the steps: pack smaller images (python -m clusterssl.data.pack "
                "SRC DST --short_side 256), or leave --decode out, so that the --workers do that"
            )
        ranks = dist.local_size()
        cores = os.cpu_count() or 1
        if self.workers < cores // ranks:
            each = f" for each of {ranks} ranks" if ranks > 1 else ""
            return f"raise --workers, now {self.workers}{each} on {cores} cores"
        inner = self.source.inner if isinstance(self.source, ClassSubset) else self.source
        busy = f"the loaders have all {cores} cores already"
        files = inner.inner if isinstance(inner, (CachedFiles, CachedSource)) else inner
        if isinstance(files, FileSource):
            return f"{busy}; pack smaller images: python -m clusterssl.data.pack SRC DST --short_side 256"
        side = max(max(size) for size in self.multicrop.sizes)
        if isinstance(files, PackedSource) and side <= 128:
            return f"{busy}; pack the images smaller, with --short_side {2 * side} or so"
        return f"{busy}; take fewer or smaller crops (--nmb_crops, --size_crops)"

    def another(self) -> Loader:
        """A loader of the same whole-dataset batches for one pass, to be used while this one is in an epoch."""
        return self._again()

    def epoch(self, epoch: int, start_step: int = 0, order: NDArray[np.int64] | None = None) -> Iterator[list[Batch]]:
        """Iterates over the optimizer steps of an epoch from `start_step` on: lists of `accumulate` batches.

        Args:
            epoch: number of the epoch.
            start_step: first step wanted.
            order: dataset positions to visit instead of all, shuffled; see `PositionSampler`.
        """
        self.sampler.epoch, self.sampler.start, self.sampler.order = epoch, start_step, order
        step: list[Batch] = []
        for batch in self._batches():
            step.append(batch)
            if len(step) == self.sampler.accumulate:
                yield step
                step = []

    def _batches(self) -> Iterator[Batch]:
        if self.decode is not None:
            return (self.decode.batch(raw, self.multicrop, self.seed) for raw in checked(self._loader))
        if self.resident is not None:
            return (self.resident.batch(self.multicrop, self.seed, keys) for keys in self.sampler)
        return self._from_workers()

    def _from_workers(self) -> Iterator[Batch]:
        if self.workers > 0 and not (self._loader.persistent_workers and self._slots.memory):
            self._slots.renew()
        memory = self._slots.memory
        yield from checked(self._loader)
        del memory  # another epoch may have renewed it while this one was under way


__all__ = ["Failure", "Guarded", "Key", "Loader", "checked", "quiet_worker", "same"]
