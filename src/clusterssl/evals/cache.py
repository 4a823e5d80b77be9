"""Features once, evaluations many: what a frozen network says of a dataset, kept in files and read memory-mapped.

The files (see `keeping`) are found by a hash of the weights, of the dataset (names, and the pixels of some images) and
of the crops.

Legend of suffixes: N images, F features.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from clusterssl import dist
from clusterssl.data import STD, BadImageError, Source, resize_for
from clusterssl.data import fingerprint as names_hash
from clusterssl.evals.features import Unreadable, extract, feature_batches, tell_left_out
from clusterssl.evals.inputs import fingerprint
from clusterssl.evals.keeping import Entry, Features

logger = logging.getLogger(__name__)

_FORMAT = 1
_LOOKED_AT = 8
HELD = 2**31
"""bytes of features that are held in memory at most"""


@dataclass(frozen=True)
class CacheOptions:
    """Features kept between evaluations."""

    cache_features: str = ""
    """folder in which features are kept for later evaluations of the same network, images and crops, and from which
    they are read memory-mapped; empty: computed anew and held in memory, in files of --dump_path from 2 GiB on"""


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
        spill: folder for features of more than `HELD` bytes where `folder` is empty; empty: memory for all.
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
    spill: str = ""

    def of(self, source: Source, what: str, indices: NDArray[np.int64] | None = None) -> Features:
        """Features of all images or of those at the positions `indices` (ascending), on every rank. A collective.

        Raises:
            UserError: the folder cannot be written.
        """
        everything = np.arange(len(source))
        chosen = everything if indices is None else np.asarray(indices)
        if not self.folder and self.spill and (size := self.size(len(chosen))) > HELD:
            logger.info("%s: %.1f GiB of features go to %s, read memory-mapped", what, size / 2**30, self.spill)
            return replace(self, folder=self.spill).of(source, what, indices)
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

    def stream(self, source: Source, what: str) -> Iterator[tuple[Tensor, Tensor]]:
        """As `own`, batch by batch, nothing is kept. A collective, at its end."""
        rows, ledger, at = np.arange(*self._share(len(source))), Unreadable(source), 0
        labels = np.asarray(source.labels)
        for batch in self._batches(source, what, rows, ledger):
            mine, at = rows[at : at + len(batch)], at + len(batch)
            keep = ledger.readable(mine)
            yield batch[torch.from_numpy(keep)], torch.from_numpy(labels[mine[keep]])
        tell_left_out(torch.from_numpy(ledger.readable(rows)), what)

    def size(self, images: int) -> int:
        """Bytes of the features of so many images."""
        return 4 * images * math.prod(self._row())

    @torch.no_grad()
    def _row(self) -> tuple[int, ...]:
        """Shape of the features of one image."""
        network = self.network.to(torch.device(self.device)).eval()
        shape = tuple(network(torch.zeros(1, 3, *self.image_size, device=self.device)).shape[1:])
        return (10, *shape) if self.ten_crops else shape

    def _share(self, images: int) -> tuple[int, int]:
        """First and last position of this rank's batches."""
        first, last = dist.share(-(-images // self.batch_size))
        return first * self.batch_size, min(last * self.batch_size, images)

    def _batches(self, source: Source, what: str, rows: NDArray[np.int64], ledger: Unreadable) -> Iterator[Tensor]:
        return feature_batches(
            self.network, source, rows, image_size=self.image_size, resize=self.resize, batch_size=self.batch_size,
            workers=self.workers, device=self.device, ledger=ledger, std=self.std, what=what, ten_crops=self.ten_crops,
        )  # fmt: skip

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
        first, last = self._share(len(rows))
        entry.write((len(rows), *self._row()), first, self._batches(source, what, rows[first:last], ledger))
        tell_left_out(torch.from_numpy(ledger.readable(rows[first:last])), what)
        entry.finish(_readable_everywhere(ledger, rows))


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
