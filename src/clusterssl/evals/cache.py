"""Features once, evaluations many: what a frozen network says of a dataset, kept in files and read memory-mapped.

One entry is two files: <key>.npy, float32 rows in dataset order, and <key>.json, written last, which says what they
are. The key is a hash of the weights, of the dataset (names, and the pixels of some images) and of the crops.

Legend of suffixes: N images, F features.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from clusterssl import dist
from clusterssl.data import STD, BadImageError, Source, resize_for
from clusterssl.data import fingerprint as names_hash
from clusterssl.errors import UserError
from clusterssl.evals.features import Unreadable, extract, feature_batches, tell_left_out
from clusterssl.evals.inputs import fingerprint
from clusterssl.files import atomic_write, first_line

logger = logging.getLogger(__name__)

_FORMAT = 1
_LOOKED_AT = 8
_ROWS_PER_COPY = 4096


@dataclass(frozen=True)
class CacheOptions:
    """Features kept between evaluations."""

    cache_features: str = ""
    """folder in which features are kept for later evaluations of the same network, images and crops, and from which
    they are read memory-mapped; empty: computed anew and held in memory"""


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


@dataclass(frozen=True)
class Extraction:
    """How features are made and where they are kept.

    Args:
        network: from images B x 3 x h x w to features B x F, or B x F x h x w.
        image_size: height and width of the centre crop.
        part: word for what `network` is, where its weights do not tell: "backbone", "embedding", "windows".
        resize: shorter side before the crop; by `resize_for` when None.
        batch_size: images at a time.
        workers: loader processes of this rank.
        device: where to compute.
        folder: of the kept features; empty for none.
        std: of the channels, for the normalisation.
        ten_crops: features B x 10 x ... of ten crops instead of the centre's.
    """

    network: nn.Module
    image_size: tuple[int, int]
    part: str = "backbone"
    resize: int | None = None
    batch_size: int = 256
    workers: int = 0
    device: torch.device | str = "cpu"
    folder: str = ""
    std: Sequence[float] = STD
    ten_crops: bool = False

    def of(self, source: Source, what: str, indices: NDArray[np.int64] | None = None) -> Features:
        """Features of all images or of those at the positions `indices` (ascending), on every rank. A collective.

        Raises:
            UserError: the folder cannot be written.
        """
        everything = np.arange(len(source))
        chosen = everything if indices is None else np.asarray(indices)
        if not self.folder:
            ledger = Unreadable(source)
            rows, labels = self._extract(source, what, chosen, ledger=ledger)
            return Features(rows, labels, torch.from_numpy(chosen[_readable_everywhere(ledger, chosen)]))
        facts = self._facts(source)
        whole, part = Entry(self.folder, facts, everything), Entry(self.folder, facts, chosen)
        if whole.complete():
            return whole.read(source, what) if indices is None else whole.read(source, what).at(chosen)
        if not part.complete():
            self._write(part, source, what)
        return part.read(source, what)

    def own(self, source: Source, what: str) -> tuple[Tensor, Tensor]:
        """Features and labels of this rank's share of the images. A collective."""
        if self.folder:
            return self.of(source, what).share()
        return self._extract(source, what, np.arange(len(source)), gather=False)

    def _extract(self, source: Source, what: str, chosen: NDArray[np.int64], **more: Any) -> tuple[Tensor, Tensor]:
        return extract(
            self.network, source, image_size=self.image_size, resize=self.resize, batch_size=self.batch_size,
            workers=self.workers, device=self.device, indices=chosen, std=self.std, what=what,
            ten_crops=self.ten_crops, **more,
        )  # fmt: skip

    def _facts(self, source: Source) -> dict[str, Any]:
        resize = resize_for(self.image_size) if self.resize is None else self.resize
        return {
            "format": _FORMAT, "network": fingerprint(self.network), "part": self.part, "data": data_hash(source),
            "images": len(source), "image_size": list(self.image_size), "resize": resize,
            "std": list(self.std), "crops": "ten" if self.ten_crops else "centre",
        }  # fmt: skip

    def _write(self, entry: Entry, source: Source, what: str) -> None:
        """Compute the features into the files, every rank its share of the batches."""
        rows, ledger = entry.chosen, Unreadable(source)
        first, last = (batches * self.batch_size for batches in dist.share(-(-len(rows) // self.batch_size)))
        network = self.network.to(torch.device(self.device)).eval()
        with torch.no_grad():
            shape = tuple(network(torch.zeros(1, 3, *self.image_size, device=self.device)).shape[1:])
        shape = (10, *shape) if self.ten_crops else shape
        batches = feature_batches(
            network, source, rows[first:last], image_size=self.image_size, resize=self.resize,
            batch_size=self.batch_size, workers=self.workers, device=self.device, ledger=ledger, std=self.std,
            what=what, ten_crops=self.ten_crops,
        )  # fmt: skip
        entry.write((len(rows), *shape), first, batches)
        tell_left_out(torch.from_numpy(ledger.readable(rows[first:last])), what)
        entry.finish(_readable_everywhere(ledger, rows))


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
        key = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:24]
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
                _lay_out(self._aside, shape)
        except OSError as error:
            problem = first_line(error)
        self._agree(problem)
        try:
            with self._aside.open("r+b") as file:
                file.seek(_offset(self._aside) + first * 4 * int(np.prod(shape[1:])))
                for batch in batches:
                    file.write(batch.contiguous().numpy().data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            problem = first_line(error)
        self._agree(problem)

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
                f"--cache_features {self.folder}: could not be written ({problem}); free space or leave the flag away"
            )


def data_hash(source: Source) -> str:
    """Hash of a dataset: the images' names below their common folder, and the pixels of some of them."""
    digest = hashlib.sha256(names_hash(source).encode())
    for i in np.unique(np.linspace(0, len(source) - 1, _LOOKED_AT).round().astype(int)):
        try:
            digest.update(np.ascontiguousarray(source.load(int(i)).numpy()).data)
        except BadImageError as error:
            digest.update(str(error).encode())
    return digest.hexdigest()[:16]


def _readable_everywhere(ledger: Unreadable, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of the positions no rank found unreadable."""
    bad = dist.all_gather_cat(torch.tensor(sorted(ledger.positions), dtype=torch.int64))
    return ~np.isin(rows, bad.numpy())


def _lay_out(path: Path, shape: tuple[int, ...]) -> None:
    """An .npy file of float32 without its numbers; the space is taken up as they are written."""
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        file.truncate(file.tell() + 4 * int(np.prod(shape)))


def _offset(path: Path) -> int:
    """Bytes before the numbers of an .npy file."""
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        return file.tell()


def _compact(path: Path, keep: NDArray[np.int64]) -> None:
    """Keep these rows only."""
    rows, shorter = np.load(path, mmap_mode="r"), path.with_suffix(".kept.tmp")
    _lay_out(shorter, (len(keep), *rows.shape[1:]))
    with shorter.open("r+b") as file:
        file.seek(_offset(shorter))
        for start in range(0, len(keep), _ROWS_PER_COPY):
            file.write(np.ascontiguousarray(rows[keep[start : start + _ROWS_PER_COPY]]).data)
    shorter.replace(path)
