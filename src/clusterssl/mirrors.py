"""Copies of the records of metrics.jsonl for TensorBoard and Weights & Biases; metrics.jsonl stays what counts.

Copies are made by a thread of their own: a full disk, a network that is gone or a package that fails costs a training
one warning, never a step.

<run>/tensorboard/    an event file, written anew from metrics.jsonl by every start
<run>/wandb/          what wandb keeps, in offline mode everything; <run>/wandb.id is the id that all starts share
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import queue
import re
import threading
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from clusterssl.entries import Entry, entries_of, entry_of, step_of
from clusterssl.errors import UserError
from clusterssl.files import atomic_write, first_line

logger = logging.getLogger(__name__)

MIRRORS = ("tensorboard", "wandb")
"""names, each of a flag, of a package, of an extra and of a folder in the run directory"""

_WAITING = 1000
"""records that may wait for a slow mirror; further ones are left out of it"""
_IMPORTED = {"tensorboard": "torch.utils.tensorboard"}
"""modules, where they are not the package itself"""
_CLOSING_S = 30.0
"""seconds that the end of a run waits for its mirrors"""


@dataclass(frozen=True)
class MirrorOptions:
    """Copies of the records."""

    tensorboard: bool = False
    """copy the records of metrics.jsonl to TensorBoard, under tensorboard/ in the run directory"""
    wandb: bool = False
    """copy them to Weights & Biases; WANDB_PROJECT, WANDB_MODE and its other variables say where and how"""

    def __post_init__(self) -> None:
        require_packages(self.mirrors)

    @property
    def mirrors(self) -> tuple[str, ...]:
        """Where the records of metrics.jsonl are copied to."""
        return tuple(name for name in MIRRORS if getattr(self, name))


class Mirror(Protocol):
    """One place that records are copied to; may raise anything at any time."""

    def catch_up(self) -> None:
        """Write what earlier starts have not; called before the first `write`, in the same thread."""

    def write(self, entry: Entry) -> None: ...
    def close(self) -> None: ...


def require_packages(names: Sequence[str]) -> None:
    """Refuse mirrors whose package is absent or broken.

    Raises:
        UserError: with the command that installs it.
    """
    for name in names:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a folder of that name, such as a run's, is no package
            raise UserError(f"--{name}: {name} is not installed; run pip install {name}, or leave the flag out")
        try:
            importlib.import_module(_IMPORTED.get(name, name))
        except Exception as error:
            raise UserError(
                f"--{name}: {name} cannot be imported ({first_line(error)}); mend it, or leave the flag out"
            ) from error


class Mirrors:
    """The mirrors of one run, on the one rank that writes; without names nothing happens."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        """Args: run directory, and which of `MIRRORS`; nothing is opened before `start`."""
        self.folder, self.names = folder, tuple(names)
        self._open: dict[str, Mirror] = {}
        self._queue: queue.Queue[Entry | None] = queue.Queue(_WAITING)
        self._thread: threading.Thread | None = None
        self._step, self._behind = 0, False

    def start(self, step: int, about: dict[str, Any]) -> None:
        """Open all mirrors; one that cannot be opened is an error at a run's begin and a warning when it goes on.

        Args:
            step: optimiser steps done; later ones that are there already will come again.
            about: method, configuration and facts of the run.

        Raises:
            UserError: see above.
        """
        for name in self.names:
            try:
                self._open[name] = _MAKERS[name](self.folder, step, about)
            except Exception as error:
                if step == 0:
                    raise UserError(f"--{name}: cannot begin ({first_line(error)}){_REMEDIES[name]}") from error
                self._lost(name, error)
        if self._open:
            self._step = step
            self._thread = threading.Thread(target=self._copy, daemon=True, name="mirrors")
            self._thread.start()

    def send(self, record: dict[str, Any]) -> None:
        """Copy a record; returns at once."""
        if self._thread is None:
            return
        self._step = step_of(record, self._step)
        try:
            self._queue.put_nowait(entry_of(record, self._step))
        except queue.Full:
            if not self._behind:
                logger.warning("--%s: too slow, some records are left out there", ", --".join(self.names))
            self._behind = True

    def close(self) -> None:
        """Finish what waits, for a limited time."""
        if self._thread is None:
            return
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=_CLOSING_S)
        self._thread.join(_CLOSING_S)
        if self._thread.is_alive():
            logger.warning("--%s: not finished within %.0f seconds, left behind", ", --".join(self.names), _CLOSING_S)
        self._thread = None

    def _copy(self) -> None:
        for name, mirror in list(self._open.items()):
            self._try(name, mirror.catch_up)
        while (entry := self._queue.get()) is not None:
            for name, mirror in list(self._open.items()):
                self._try(name, lambda mirror=mirror, entry=entry: mirror.write(entry))  # type: ignore[misc]
        for name, mirror in list(self._open.items()):
            self._try(name, mirror.close)

    def _try(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:
            del self._open[name]
            self._lost(name, error)

    def _lost(self, name: str, error: Exception) -> None:
        logger.warning("--%s failed (%s); the run goes on without it, metrics.jsonl is whole", name, first_line(error))


class _TensorBoard:
    def __init__(self, folder: Path, step: int, about: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._metrics, self._step = folder / "metrics.jsonl", step
        for earlier in (folder / "tensorboard").glob("events.out.tfevents.*"):
            earlier.unlink()
        # A TensorBoard that is watching drops what it has read: all of it comes again.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=0)

    def catch_up(self) -> None:
        for entry in entries_of(self._metrics, self._step) if self._step and self._metrics.exists() else []:
            self._add(entry)
        self._writer.flush()

    def write(self, entry: Entry) -> None:
        self._add(entry)
        self._writer.flush()  # or a kill takes records along that the checkpoint has passed

    def _add(self, entry: Entry) -> None:
        for name, value in entry.values.items():
            self._writer.add_scalar(name, value, entry.step, entry.time)
        for name, counts in entry.counts.items():
            self._writer.add_histogram(name, np.asarray(counts), entry.step, walltime=entry.time)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, folder: Path, step: int, about: dict[str, Any]) -> None:
        import wandb

        # An exit must not wait for a network for ever, and a kill must not take much along.
        wanted = {
            "console": "off",
            "finish_timeout": _CLOSING_S,
            "x_transaction_log_flush_interval": 1.0,
            "silent": True,
        }
        known = wandb.Settings()
        self._run = wandb.init(
            id=_kept_id(folder / "wandb.id"), resume="allow", dir=str(folder), config=about,
            project=os.environ.get("WANDB_PROJECT", "clusterssl"),
            name=os.environ.get("WANDB_NAME", folder.resolve().name),
            settings={key: value for key, value in wanted.items() if hasattr(known, key)},
        )  # fmt: skip
        # wandb never goes back: what an earlier start sent is left out, which offline only metrics.jsonl knows.
        self._sent = _highest_step(folder / "metrics.jsonl") if self._run.offline else self._run.step - 1
        self._histogram = wandb.Histogram
        logger.info("--wandb: %s", self._run.url or self._run.dir)

    def catch_up(self) -> None:
        pass

    def write(self, entry: Entry) -> None:
        if entry.step > self._sent:
            counts = {name: self._histogram(value) for name, value in entry.counts.items()}
            self._run.log({**entry.values, **counts}, step=entry.step)

    def close(self) -> None:
        self._run.finish()


_MAKERS: dict[str, Callable[[Path, int, dict[str, Any]], Mirror]] = {"tensorboard": _TensorBoard, "wandb": _Wandb}
_REMEDIES = {
    "tensorboard": "; leave the flag out to train without it",
    "wandb": "; wandb login, or WANDB_MODE=offline to keep it on this disk",
}


def _kept_id(path: Path) -> str:
    """The id under which every start of a run reports."""
    if not path.exists():
        made = uuid.uuid4().hex[:12]
        atomic_write(path, lambda file: file.write(made.encode()))
    return path.read_text().strip()


def _highest_step(metrics: Path) -> int:
    """The highest step of a metrics file, 0 where there is none."""
    text = metrics.read_bytes() if metrics.exists() else b""
    return max(map(int, re.findall(rb'"(?:step|epoch)": (\d+)', text)), default=0)
