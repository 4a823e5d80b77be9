"""Checkpoints that are written while training goes on, whole or absent whatever happens meanwhile.

A save has three parts. At a step boundary all ranks copy their state (`Snapshots`). Then a thread of each rank writes
the rank's shard and reports that on the store that the ranks met with. When all have, the thread of rank 0 writes the
shared file, whose renaming is the moment from which the checkpoint counts, and only then removes shards that neither it
nor the one before needs.

Why this holds. Threads call no collective: those would mix with training's. Reports are counted under a number that no
other save has, so shards that an interrupted save left at the same step are never mistaken for this one's. A file is
written aside, synced and renamed; whoever is killed leaves an unfinished file that the next start removes, and shards
that no shared file speaks of. One save is under way at most, so what is removed is never needed by another. Signals
set a flag in the main thread and do not reach the writer. Failures are kept until the main threads meet, where all
ranks raise the first one. The writer gives no sign of life (`pulse`): it says nothing about training.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clusterssl import dist, pulse
from clusterssl.dist import World
from clusterssl.errors import UserError
from clusterssl.files import atomic_link, first_line, make_folder, save_checkpoint
from clusterssl.snapshot import Snapshots

logger = logging.getLogger(__name__)

CURRENT = "checkpoint.pth.tar"
PREVIOUS = "checkpoint.previous.pth.tar"
_POLL_S = 0.02
_PATIENCE_S = 5.0
"""for the shards of other ranks when this one ends, on top of the time that its own took"""
_numbers = itertools.count()


def shard_path(folder: Path, step: int, rank: int, size: int) -> Path:
    """File of what rank `rank` of `size` holds alone after `step` steps."""
    return folder / f"checkpoint.step{step}.rank{rank}-of-{size}.pth"


class Saver:
    """Writes the checkpoints of a run directory, one at a time; all ranks call the same methods in the same order."""

    def __init__(self, folder: Path, world: World, sync_records: Callable[[], None] = lambda: None) -> None:
        """Name the directory.

        Args:
            folder: the run directory.
            world: the ranks.
            sync_records: brings to the disk what a checkpoint must not be ahead of.
        """
        self.folder, self.world, self.sync_records = folder, world, sync_records
        self.step = -1
        """of the checkpoint that is there"""
        self.sound = True
        """whether that one is readable, and so may become the previous one"""
        self.seconds = 0.0
        """that the last save took, in rank 0"""
        self.snapshots = Snapshots()
        self._save: _Save | None = None

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing."""
        return self._save is not None and self._save.is_alive()

    @property
    def failed(self) -> bool:
        """Whether this rank could not write; `finish` says why."""
        return self._save is not None and self._save.problem != ""

    def begin(
        self, shared: dict[str, Any], sharded: dict[str, Tensor], *, step: int, keep_as: str = "", copy: bool = True
    ) -> None:
        """Start a save when the one before is complete; a collective call.

        Args:
            shared: equal on all ranks (rank 0's is written): tensors and plain values.
            sharded: tensors whose rows (dimension 0), in rank order, make up one global tensor.
            step: optimiser steps done.
            keep_as: also keep it under checkpoints/ by this name.
            copy: of the state, which may then change; otherwise it must not before `finish`.

        Raises:
            UserError: the save before failed; the checkpoint before that is intact.
        """
        self.finish()
        rows = {name: int(dist.all_reduce_(torch.tensor(len(tensor)))) for name, tensor in sharded.items()}
        facts = {"step": step, "shards": self.world.size if sharded else 0, "rows": rows}
        state = ({**shared, **facts} if self.world.is_main else {}, sharded)
        save = _Save(self, self.snapshots.take(state) if copy else state, step, keep_as)
        save.start()
        self._save = save

    def finish(self) -> None:
        """Wait until the save under way, if any, is complete on all ranks; a collective call.

        Raises:
            UserError: it failed on some rank; the checkpoint before is intact.
        """
        save, self._save = self._save, None
        if save is None:
            return
        pulse.beat(f"waiting for the checkpoint of step {save.step}")
        try:
            save.written.wait()
            save.raise_first()
        finally:  # also where another rank was lost
            save.end()
        save.raise_first()
        self.step, self.sound, self.seconds = save.step, True, save.seconds

    def close(self) -> None:
        """Let a save under way be completed where a run ends without `finish`; this rank alone, within bounded time."""
        save, self._save = self._save, None
        if save is None:
            return
        save.written.wait(_PATIENCE_S)
        save.join(_PATIENCE_S + save.seconds)
        save.end(_PATIENCE_S)
        if save.problem:
            logger.warning("the checkpoint of step %d was not completed: %s", save.step, save.problem)

    def rehearse(self, shared: dict[str, Any], sharded: dict[str, Tensor]) -> float:
        """Write a state and remove it again; a collective call.

        Returns:
            Seconds that a save takes, the same on all ranks.

        Raises:
            UserError: it could not be written.
        """
        path, problem = self.folder / f".rehearsal.rank{self.world.rank}.tmp", ""
        seconds = []
        for state in (sharded, shared if self.world.is_main else {}):
            began = time.monotonic()
            try:
                if state:
                    save_checkpoint(state, path)
            except UserError as error:
                problem = problem or str(error)
            path.unlink(missing_ok=True)
            seconds.append(time.monotonic() - began)
        _raise_first(problem)
        return float(dist.all_reduce_(torch.tensor(seconds, dtype=torch.float64), "max").sum())

    def prune(self, step: int) -> None:
        """Remove shards that neither the checkpoint of this step nor the one before needs."""
        for path in self.folder.glob("checkpoint.step*.rank*.pth"):
            if int(path.name.split(".")[1][4:]) not in (step, self.step):
                path.unlink(missing_ok=True)


class _Save(threading.Thread):
    """One save of one rank."""

    def __init__(self, saver: Saver, state: tuple[dict[str, Any], dict[str, Tensor]], step: int, keep_as: str) -> None:
        super().__init__(name="checkpoint writer", daemon=True)
        self.step, self.problem, self.seconds = step, "", 0.0
        self.written = threading.Event()
        """this rank's part is done, well or not, and reported"""
        self._saver, self._keep_as = saver, keep_as
        self._shared, self._sharded = state
        self._defect: Exception | None = None
        self._store, self._key = dist.store(), f"save{next(_numbers)}"
        self._wait_no_longer = threading.Event()

    def end(self, timeout: float | None = None) -> None:
        """Wait for no rank that has not reported, and be over."""
        self._wait_no_longer.set()
        self.join(timeout)

    def raise_first(self) -> None:
        """Raise on all ranks what went wrong on any; a collective call."""
        try:
            _raise_first(self.problem)
        except UserError:
            if self._defect is not None:
                raise self._defect from None
            raise

    def run(self) -> None:
        began = time.monotonic()
        try:
            self._guarded(self._take_device)
            self._guarded(self._write_shard)
            self._guarded(self._report)
            self.seconds = time.monotonic() - began
            self.written.set()
            if self._saver.world.is_main and not self.problem:
                self._guarded(self._complete)
        finally:
            self.written.set()
            self.seconds = time.monotonic() - began

    def _guarded(self, part: Callable[[], None]) -> None:
        folder = self._saver.folder
        try:
            part()
        except UserError as error:
            self.problem = str(error)
        except OSError as error:
            self.problem = f"{folder}: {first_line(error)}; the checkpoint before is intact"
        except Exception as error:
            self._defect = error
            self.problem = f"{folder}: the checkpoint of step {self.step} failed ({first_line(error)})"

    def _take_device(self) -> None:
        if self._saver.world.device.type == "cuda":  # each thread has a current one, the first at its start
            torch.cuda.set_device(self._saver.world.device)

    def _write_shard(self) -> None:
        world = self._saver.world
        self._saver.snapshots.wait()
        if self._sharded:
            save_checkpoint(self._sharded, shard_path(self._saver.folder, self.step, world.rank, world.size))

    def _report(self) -> None:
        if self.problem:
            self._store.set(f"{self._key}/failed", "")
        self._store.add(self._key, 1)

    def _complete(self) -> None:
        """Write the shared file once all ranks have reported, unless one has failed."""
        while True:
            last = self._wait_no_longer.is_set()  # asked first: who sets it may have seen the reports that we look for
            if self._store.add(self._key, 0) == self._saver.world.size:
                break
            if last:
                self.problem = "other ranks ended before they wrote their part"
                return
            self._wait_no_longer.wait(_POLL_S)
        if self._store.check([f"{self._key}/failed"]):
            return
        saver = self._saver
        saver.sync_records()
        current, previous = saver.folder / CURRENT, saver.folder / PREVIOUS if saver.sound else None
        if self._keep_as:  # the kept copy first: a run that is killed in between writes both again
            kept = saver.folder / "checkpoints" / self._keep_as
            make_folder(kept.parent)
            save_checkpoint(self._shared, kept)
            atomic_link(kept, current, keep_previous_as=previous)
        else:
            save_checkpoint(self._shared, current, keep_previous_as=previous)
        saver.prune(self.step)


def _raise_first(problem: str) -> None:
    """Raise on all ranks the problem of the first that has one; a collective call."""
    problem = dist.first_problem(problem)
    if problem:
        raise UserError(problem)
