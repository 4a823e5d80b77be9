"""Features of a dataset in files: two for each set, written by all ranks together, read memory-mapped.

<key>.npy, float32 rows in dataset order, and <key>.json, written last, which says what they are.

Legend of suffixes: N images.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from clusterssl import dist
from clusterssl.data import Source
from clusterssl.errors import UserError
from clusterssl.files import atomic_write, first_line

logger = logging.getLogger(__name__)

_ROWS_PER_COPY = 4096
_KEY = 24
_ASIDE = f".{'[0-9a-f]' * _KEY}.*.tmp"
_ABANDONED_S = 3600.0


class Features(NamedTuple):
    """Features of the readable images, in dataset order."""

    rows: Tensor
    """float32 [N, ...] on the CPU; memory-mapped when they come from files"""
    labels: Tensor
    """int64 [N]"""
    positions: Tensor
    """int64 [N] dataset positions"""

    def at(self, positions: NDArray[np.int64]) -> Features:
        """The rows of these dataset positions (ascending), in memory; those that could not be read are left out."""
        keep = torch.from_numpy(np.flatnonzero(np.isin(self.positions.numpy(), positions)))
        return Features(self.rows[keep], self.labels[keep], self.positions[keep])

    def share(self) -> tuple[Tensor, Tensor]:
        """Rows and labels of this rank's share."""
        start, stop = dist.share(len(self.rows))
        return self.rows[start:stop], self.labels[start:stop]


class Entry:
    """The files of one set of features.

    Args:
        folder: where they are.
        facts: of network, dataset and crops.
        chosen: dataset positions of the rows, ascending.
    """

    def __init__(self, folder: str, facts: dict[str, Any], chosen: NDArray[np.int64]) -> None:
        subset = "" if len(chosen) == facts["images"] else hashlib.sha256(np.int64(chosen).tobytes()).hexdigest()[:16]
        self.facts = {**facts, "subset": subset}
        key = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:_KEY]
        self.folder, self.chosen = Path(folder), chosen
        self.rows, self.about = self.folder / f"{key}.npy", self.folder / f"{key}.json"
        self._aside = self.folder / f".{key}.{dist.broadcast_object(os.getpid())}.tmp"

    def complete(self) -> bool:
        """Whether both files are there and fit, as rank 0 sees them."""
        fits = False
        if dist.rank() == 0 and self.about.exists():
            try:
                about = json.loads(self.about.read_text())
                rows = np.load(self.rows, mmap_mode="r")
                fits = about["facts"] == self.facts and len(rows) == len(self.chosen) - len(about["unreadable"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                logger.warning("%s: damaged (%s), computed anew", self.rows, first_line(error))
        return dist.broadcast_object(fits)

    def read(self, source: Source, what: str) -> Features:
        """The features, memory-mapped, from files that are complete."""
        logger.info("%s: features read from %s", what, self.rows)
        rows = torch.from_numpy(np.load(self.rows, mmap_mode="c"))
        positions = np.setdiff1d(self.chosen, json.loads(self.about.read_text())["unreadable"])
        return Features(rows, torch.from_numpy(np.asarray(source.labels)[positions]), torch.from_numpy(positions))

    def write(self, shape: tuple[int, ...], first: int, batches: Iterator[Tensor]) -> None:
        """Write this rank's rows, from row `first` on, into the file that rank 0 lays out. A collective."""
        problem = ""
        try:
            if dist.rank() == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._sweep()
                lay_out(self._aside, shape)
        except OSError as error:
            problem = first_line(error)
        self._agree(problem)
        try:
            with self._aside.open("r+b") as file:
                file.seek(offset(self._aside) + first * 4 * int(np.prod(shape[1:])))
                for batch in batches:
                    file.write(batch.contiguous().numpy().data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            problem = first_line(error)
        except BaseException:  # gigabytes that nobody would ever read
            self._aside.unlink(missing_ok=True)
            raise
        self._agree(problem)

    def _sweep(self) -> None:
        """Remove what killed processes left in the folder; one that is still being written is younger."""
        for left in self.folder.glob(_ASIDE):
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > _ABANDONED_S:
                    left.unlink()

    def finish(self, readable: NDArray[np.bool_]) -> None:
        """Leave out rows of unreadable images and give the files their names (rank 0). A collective."""
        problem = ""
        if dist.rank() == 0:
            try:
                if not readable.all():
                    _compact(self._aside, np.flatnonzero(readable))
                self._aside.replace(self.rows)
                about = {"facts": self.facts, "unreadable": self.chosen[~readable].tolist()}
                text = json.dumps(about, indent=1) + "\n"
                atomic_write(self.about, lambda file: file.write(text.encode()))
            except (OSError, UserError) as error:
                problem = first_line(error)
        self._agree(problem)

    def _agree(self, problem: str) -> None:
        """Raise on all ranks what went wrong on any."""
        problems = [dist.broadcast_object(problem, src) for src in range(dist.size())]
        problem = next((text for text in problems if text), "")
        if problem:
            with contextlib.suppress(OSError):
                self._aside.unlink(missing_ok=True)
            raise UserError(
                f"--cache_features {self.folder}: could not be written ({problem}); free space or leave the flag out"
            )


def lay_out(path: Path, shape: tuple[int, ...], dtype: DTypeLike = "<f4") -> None:
    """An .npy file without its numbers; the space is taken up as they are written."""
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
        file.truncate(file.tell() + np.dtype(dtype).itemsize * int(np.prod(shape)))


def offset(path: Path) -> int:
    """Bytes before the numbers of an .npy file."""
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        return file.tell()


def _compact(path: Path, keep: NDArray[np.int64]) -> None:
    """Keep these rows only."""
    rows, shorter = np.load(path, mmap_mode="r"), path.with_suffix(".kept.tmp")
    lay_out(shorter, (len(keep), *rows.shape[1:]))
    with shorter.open("r+b") as file:
        file.seek(offset(shorter))
        for start in range(0, len(keep), _ROWS_PER_COPY):
            file.write(np.ascontiguousarray(rows[keep[start : start + _ROWS_PER_COPY]]).data)
    shorter.replace(path)
