"""One pass over a folder of images, kept in files as it goes, so that a killed one goes on where it was.

Legend of suffixes: N images, F features, P pixels of a grey copy.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from clusterssl.data import EvalBatch, Source, eval_batches, resize_for
from clusterssl.data import fingerprint as names_hash
from clusterssl.errors import UserError
from clusterssl.evals.features import Unreadable
from clusterssl.evals.inputs import Network, fingerprint
from clusterssl.evals.keeping import lay_out, offset
from clusterssl.files import atomic_write, first_line
from clusterssl.labelling.reading import Reader, ReadingOptions, Said

logger = logging.getLogger(__name__)

T = TypeVar("T")

_SECONDS_BETWEEN_MARKS = 5.0
_SECONDS_BETWEEN_LINES = 10.0
_ROWS_PER_COPY = 4096
NAMES = ("features", "clusters", "grey")
"""of the files, in the order of `Said`"""


class Rows:
    """Rows in an .npy file, copied into memory as they are asked for; never more of the file is mapped than a piece."""

    def __init__(self, path: Path) -> None:
        self.path = path
        mapped = np.load(path, mmap_mode="r")
        self.shape: tuple[int, ...] = mapped.shape
        self._dtype = mapped.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, which: NDArray[np.int64]) -> Tensor:
        """Rows at some positions."""
        rows = np.empty((len(which), *self.shape[1:]), self._dtype)
        for start in range(0, len(which), _ROWS_PER_COPY):
            part = slice(start, start + _ROWS_PER_COPY)
            rows[part] = np.load(self.path, mmap_mode="r")[which[part]]
        return torch.from_numpy(rows)


class Scan:
    """What a network said of all images, in files of a folder.

    Args:
        folder: of the files.
        facts: of network, images and crops; another pass may not have left its files here.

    Raises:
        UserError: the folder holds the pass of another network, other images or other flags.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.folder, self.facts = folder, facts
        self.mark = folder / "progress.json"
        self.done, self.bad = 0, list[int]()
        if self.mark.exists():
            self._take_up()

    def _take_up(self) -> None:
        try:
            found = json.loads(self.mark.read_text())
            self.done, self.bad, facts = int(found["done"]), list(found["unreadable"]), dict(found["facts"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.mark}: damaged ({first_line(error)}); remove {self.folder} and begin anew"
            ) from error
        differ = [name for name, value in self.facts.items() if facts.get(name) != value]
        if differ:
            told = ", ".join(f"{_WORDS.get(name, name)} ({facts.get(name)}, now {self.facts[name]})" for name in differ)
            raise UserError(f"--out {self.folder.parent}: holds another labelling, it differs in {told}; name another")

    @property
    def images(self) -> int:
        """N, unreadable ones included."""
        return int(self.facts["images"])

    def readable(self) -> NDArray[np.int64]:
        """Positions of the images that could be read, ascending."""
        return np.setdiff1d(np.arange(self.images), np.array(self.bad, dtype=np.int64), assume_unique=True)

    def rows(self, name: str) -> Rows:
        """One of the files `NAMES`."""
        return Rows(self.folder / f"{name}.npy")

    def run(self, reader: Reader, source: Source, network: Network, options: ReadingOptions, workers: int) -> None:
        """Read all images that are not read yet.

        Raises:
            UserError: no image could be read, or the disk is full.
        """
        device = next(reader.parameters()).device
        if self.done:
            logger.info("%s: %d of %d images are read already", self.folder, self.done, self.images)
        ledger = Unreadable(source)
        ledger.positions = set(self.bad)
        batches = eval_batches(
            source, np.arange(self.done, self.images), image_size=network.image_size,
            resize=resize_for(network.image_size), batch_size=options.batch_size, workers=workers, device=device,
            ledger=ledger, std=network.std,
        )  # fmt: skip
        try:
            self._write(self._read(reader, shown(batches, self.images, self.done, "images")), ledger)
        except OSError as error:
            raise UserError(f"{self.folder}: could not be written ({first_line(error)}); free some space") from error
        if len(self.bad) == self.images:
            raise UserError(f"none of the {self.images} images can be read; the first: {source.name(0)}")

    def _read(self, reader: Reader, batches: Iterable[EvalBatch]) -> Iterator[Said]:
        for batch in batches:
            yield Said(*(part.cpu() for part in reader(batch.images)))

    def _write(self, parts: Iterator[Said], ledger: Unreadable) -> None:
        files: list[IO[bytes]] = []
        marked = time.monotonic()
        try:
            for said in parts:
                files = files or self._open(said)
                for file, rows in zip(files, said, strict=True):
                    file.write(rows.contiguous().numpy().data if rows.numel() else b"")
                self.done, self.bad = self.done + len(said[0]), sorted(ledger.positions)
                if time.monotonic() - marked > _SECONDS_BETWEEN_MARKS or self.done == self.images:
                    self._mark(files)
                    marked = time.monotonic()
        finally:
            for file in files:
                file.close()

    def _open(self, said: Said) -> list[IO[bytes]]:
        """The files, laid out where they are new, each at its first row that is not written yet."""
        self.folder.mkdir(parents=True, exist_ok=True)
        files: list[IO[bytes]] = []
        for name, rows in zip(NAMES, said, strict=True):
            path = self.folder / f"{name}.npy"
            if not self.done:
                lay_out(path, (self.images, *rows.shape[1:]), rows.numpy().dtype)
            file = path.open("r+b")
            file.seek(offset(path) + self.done * rows[:1].numel() * rows.element_size())
            files.append(file)
        return files

    def _mark(self, files: list[IO[bytes]]) -> None:
        for file in files:
            file.flush()
            os.fsync(file.fileno())
        found = {"facts": self.facts, "done": self.done, "unreadable": self.bad}
        atomic_write(self.mark, lambda file: file.write((json.dumps(found) + "\n").encode()))


_WORDS = {"network": "the network's weights", "data": "the images", "images": "the number of images"}


def facts_of(reader: Reader, source: Source, network: Network, options: ReadingOptions) -> dict[str, Any]:
    """What makes two passes the same."""
    return {
        "format": 1, "network": fingerprint(reader), "data": names_hash(source), "images": len(source),
        "image_size": list(network.image_size), "std": list(network.std),
        "features": "embedding" if options.use_mlp else "backbone", "head": reader.head,
        "temperature": reader.temperature,
    }  # fmt: skip


def shown(batches: Iterable[EvalBatch], total: int, done: int, what: str) -> Iterator[EvalBatch]:
    """Pass batches on under a bar, or with a line every ten seconds where there is no terminal."""
    with tqdm(total=total, initial=done, unit=" images", desc=what, disable=not sys.stderr.isatty()) as bar:
        start = last = time.monotonic()
        first = done
        for batch in batches:
            yield batch
            done += len(batch.images)
            bar.update(len(batch.images))
            now = time.monotonic()
            if bar.disable and (now - last > _SECONDS_BETWEEN_LINES or done >= total):
                last = now
                logger.info("%s: %d of %d, %.0f/s", what, done, total, (done - first) / max(now - start, 1e-9))
