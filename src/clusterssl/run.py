"""The run directory: what a run is, what it measured, and checkpoints that are whole or absent.

run.json                       command, configuration, versions, commit of the first start
launches.jsonl                 one record per start
metrics.jsonl                  append-only; after a resume, steps may occur twice and the last one counts
train.log                      what the screen showed
report.html                    the page of a run that has ended
tensorboard/, wandb/, wandb.id copies of metrics.jsonl, where they are asked for
checkpoint.pth.tar             shared state, written last; checkpoint.previous.pth.tar is the one before
checkpoint.step<n>.rank<r>-of-<w>.pth   state that is split over ranks
checkpoints/ckp-<epoch>.pth    kept copies
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clusterssl import dist
from clusterssl.dist import World
from clusterssl.errors import UserError
from clusterssl.files import first_line, read_whole
from clusterssl.log import log_to_file
from clusterssl.metrics_file import MetricsFile
from clusterssl.mirrors import Mirrors
from clusterssl.saving import CURRENT, PREVIOUS, Saver, shard_path
from clusterssl.shared_folder import why_not_shared
from clusterssl.starts import SILENT, Starts

logger = logging.getLogger(__name__)

_WAITS_S = (0, 1, 2, 4, 8)


class Run:
    """One run directory, opened by all ranks; rank 0 writes what is shared."""

    def __init__(self, folder: str | Path, world: World, mirrors: Sequence[str] = ()) -> None:
        """Name the directory, and where records are copied to; nothing is read or written before `open`."""
        self.folder = Path(folder)
        self.world = world
        self._metrics = MetricsFile(self.folder / "metrics.jsonl")
        self._mirrors = Mirrors(self.folder, mirrors if world.is_main else ())
        self._about: dict[str, Any] = {}
        self._starts = Starts(self.folder)
        self.saver = Saver(self.folder, world, self._before_save)

    def check(self, method: str, config: dict[str, Any], fixed: frozenset[str]) -> dict[str, Any] | None:
        """Refuse early what `open` would; a collective call that writes nothing.

        Returns:
            Flags and facts of the first start where there is a checkpoint to go on from, else None.

        Raises:
            UserError: the directory holds a run of another method or of incompatible flags.
        """
        problem, before = "", None
        if self.world.is_main:
            try:
                self._starts.compare(method, config, fixed)
                before = self._starts.first().about if self.has_checkpoint() else None
            except UserError as error:
                problem = str(error)
            except OSError as error:
                problem = f"--dump_path {self.folder}: cannot be read ({first_line(error)}); choose another folder"
        problem, before = dist.broadcast_object((problem, before))
        if problem:
            raise UserError(problem)
        return before

    def open(
        self, method: str, config: dict[str, Any], facts: dict[str, Any], fixed: frozenset[str],
        planned: frozenset[str] = frozenset(),
    ) -> None:  # fmt: skip
        """Check that the directory is this run's or free, then record this start.

        Args:
            method: name of the method, e.g. "swav".
            config: flags and values.
            facts: derived values that a resume must find again, e.g. {"global_batch": 256, "num_images": 5000}.
            fixed: flags that must not differ from those of the first start.
            planned: flags and facts that may differ until there is a checkpoint; this start is the first one then.

        Raises:
            UserError: the directory holds a run of another method or of incompatible flags, or cannot be written.
        """
        problem, changed = "", {}
        self._about = {"method": method, **config, **facts}
        if self.world.is_main:
            try:
                loose = frozenset() if self.has_checkpoint() else planned
                changed = self._starts.compare(method, {**config, **facts}, (fixed | facts.keys()) - loose)
                self._starts.record(self.world, method, config, facts, anew=bool(loose))
            except UserError as error:
                problem = str(error)
            except OSError as error:
                problem = f"--dump_path {self.folder}: cannot be written ({first_line(error)}); choose another folder"
        problem = dist.broadcast_object(problem) or why_not_shared(self.folder)
        if problem:
            raise UserError(problem)
        log_to_file(self.folder / "train.log", self.world)
        for flag in [key for key in changed if key in config and key not in SILENT]:
            logger.info("%s", changed[flag])

    def begin(self, step: int) -> None:
        """Open the mirrors of a run that goes on after so many steps; a collective call.

        Raises:
            UserError: one cannot be opened at the begin of a run.
        """
        problem = ""
        try:
            self._mirrors.start(step, self._about)
        except UserError as error:
            problem = str(error)
        problem = dist.broadcast_object(problem)
        if problem:
            raise UserError(problem)

    def log(self, record: dict[str, Any]) -> None:
        """Append one record to metrics.jsonl (rank 0) and copy it to the mirrors."""
        if self.world.is_main:
            self._metrics.append(record)
            self._mirrors.send(record)

    def save(self, shared: dict[str, Any], sharded: dict[str, Tensor], *, step: int, keep_as: str = "") -> None:
        """Write a checkpoint and wait until it is complete; `saver` can do it while training goes on.

        Args:
            shared: equal on all ranks (rank 0's is written): tensors and plain values.
            sharded: tensors whose rows (dimension 0), in rank order, make up one global tensor.
            step: optimiser steps done.
            keep_as: also keep it under checkpoints/ by this name.

        Raises:
            UserError: a file could not be written; the checkpoint before is intact.
        """
        self.saver.begin(shared, sharded, step=step, keep_as=keep_as, copy=False)
        self.saver.finish()

    def has_checkpoint(self) -> bool:
        """Whether there is something to resume from."""
        return any((self.folder / name).exists() for name in (CURRENT, PREVIOUS))

    def load(self) -> dict[str, Any] | None:
        """The newest readable checkpoint with this rank's rows of its sharded tensors under "sharded", or None.

        Raises:
            UserError: there are checkpoints but none is readable; nothing is started anew over them.
        """
        problems: list[str] = []
        for name in (CURRENT, PREVIOUS):
            if not dist.broadcast_object((self.folder / name).exists()):
                continue
            state, problem = self._read_together(self.folder / name)
            if not problem:
                if problems:
                    logger.warning("%s; falling back to %s", problems[0], name)
                self.saver.step, self.saver.sound = state["step"], not problems
                return state
            problems.append(problem)
        if problems:
            remedy = "there is no older checkpoint that can be read, remove the file to start from the beginning"
            raise UserError(f"{problems[0]}; {remedy}")
        return None

    def _read_together(self, path: Path) -> tuple[dict[str, Any], str]:
        """What this rank reads of a checkpoint, and what is wrong with it on any; waits for caches that are behind."""
        steps: list[Any] = []
        for seconds in _WAITS_S:
            time.sleep(seconds)
            state, problem = {}, ""
            try:
                state = self._read(path)
            except (UserError, OSError, KeyError) as error:
                problem = str(error)
            problem, steps = dist.first_problem(problem), dist.gather_objects(state.get("step"))
            if problem or len(set(steps)) == 1:
                return state, problem
        return {}, f"{path}: ranks read checkpoints of different steps, {min(steps)} to {max(steps)}"

    def _before_save(self) -> None:
        """What must be so before a checkpoint counts: records on the disk, and no later start of this run."""
        self._metrics.sync()
        self._starts.require_last()

    def _read(self, path: Path) -> dict[str, Any]:
        state = read_whole(path)
        if "step" not in state or "shards" not in state:
            raise UserError(f"{path}: a checkpoint of another program; use --init to start from its weights")
        state["sharded"] = self._my_shard(state["step"], state["shards"], state.get("rows", {}))
        return state

    def _my_shard(self, step: int, shards: int, rows: dict[str, int]) -> dict[str, Tensor]:
        """This rank's rows of what was split over `shards` ranks, read one file at a time."""
        if shards in (0, self.world.size):
            return read_whole(shard_path(self.folder, step, self.world.rank, shards)) if shards else {}
        mine: dict[str, list[Tensor]] = {name: [] for name in rows}
        before = dict.fromkeys(rows, 0)
        for rank in range(shards):
            part = read_whole(shard_path(self.folder, step, rank, shards))
            for name, total in rows.items():
                first, end = dist.share(total)
                start = before[name]
                mine[name].append(part[name][max(first - start, 0) : max(end - start, 0)].clone())
                before[name] += len(part[name])
        return {name: torch.cat(parts) for name, parts in mine.items()}

    def close(self) -> None:
        """Complete a checkpoint under way, close the metrics file and the mirrors; no collective call."""
        self.saver.close()
        self._metrics.close()
        self._mirrors.close()
