"""Where images come from: folders, packed folders, list files, the built-in digits, synthetic pictures.

Everything downstream sees a `Source`: numbered images with names and, where known, labels.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from clusterssl.data.builtin import digits, synthetic
from clusterssl.data.cache import Cache, cached
from clusterssl.data.decode import decode, read_file
from clusterssl.data.listing import Listing, list_file, list_folder
from clusterssl.data.packed import PackedSource, is_packed
from clusterssl.data.patience import PATIENCE_S, load_patiently
from clusterssl.data.subset import class_subset
from clusterssl.errors import UserError

logger = logging.getLogger(__name__)


_SIZES = 1000


class Source(Protocol):
    """Numbered images."""

    classes: list[str]
    """class names; empty if unlabelled"""
    labels: NDArray[np.int64]
    """[N] positions in `classes`; -1 unlabelled"""

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """Path of image i, or another name that tells the user which it is."""
        ...

    def load(self, i: int) -> Tensor:
        """Image i as uint8 [3, H, W] RGB. Raises BadImageError."""
        ...


class FileSource:
    """Images in files."""

    def __init__(self, listing: Listing, patience_s: float = PATIENCE_S) -> None:
        """Args: what there is; seconds to wait for a file system that is out of reach."""
        self.classes = listing.classes
        self.labels = listing.labels
        self._names = listing.names
        self._patience_s = patience_s

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        """Path of image i."""
        return self._names[i]

    def file_bytes(self, i: int) -> int:
        """Size of the file of image i; raises OSError."""
        return os.path.getsize(self.name(i))  # noqa: PTH202

    def load(self, i: int) -> Tensor:
        """Decodes image i; see `decode` and `load_patiently`."""
        return decode(self.read(i))

    def read(self, i: int) -> NDArray[np.uint8]:
        """Bytes of the file of image i, uint8 [n]."""
        path = self.name(i)
        return load_patiently(lambda: read_file(path), self._names.root, self._patience_s)


def open_source(
    data_path: str, *, split: str = "", limit: int = -1, subset_file: str = "", patience_s: float = PATIENCE_S,
    cache: Cache = "auto",
) -> Source:  # fmt: skip
    """Opens the images named by `data_path`.

    Args:
        data_path: "digits" (scikit-learn's handwritten digits at 32 pixels; splits train, val, test),
            "synthetic[:N[:HxW[:classes]]]", a folder (class folders, nested or not; or pictures directly in it; or
            what `clusterssl.data.pack` made of one), or a .txt / .lst file with one path per line, optionally followed
            by a tab or space and a label.
        split: subfolder (or built-in split) to use; empty: the folder itself, or its train/ if it holds train/ and
            val/ or test/.
        limit: keep the first `limit` images; negative: all.
        subset_file: text file that names the classes to keep (of those images), see `class_subset`; empty: all.
        patience_s: seconds to wait for files whose file system is out of reach.
        cache: what of the files is kept in memory, see `cached`.

    Raises:
        UserError: nothing there, no images in it, no such split, no such classes, or too little memory for the cache.
    """
    source = _all_classes(data_path, split, limit, patience_s, cache)
    return class_subset(source, subset_file) if subset_file else source


def _all_classes(data_path: str, split: str, limit: int, patience_s: float, cache: Cache) -> Source:
    kind = str(data_path).split(":")[0]
    if not str(data_path):
        raise UserError("no data: give a folder, a list file, digits or synthetic as data_path")
    if limit == 0:
        raise UserError("a limit of 0 images leaves nothing to read: give a positive number, or -1 for all")
    if data_path == "digits":
        return digits(split, limit)
    if kind == "synthetic":
        return synthetic(str(data_path), split, limit)
    path = Path(data_path).expanduser()
    if path.is_file():
        if path.suffix.lower() not in (".txt", ".lst"):
            raise UserError(f"{path} is a file: give a folder, or a .txt or .lst file with one path per line")
        if split:
            raise UserError(f"{path} is a list file, which has no split {split!r}: give a folder that holds {split}/")
        listing = list_file(path)
    else:
        path = _split_folder(path, split)
        if is_packed(path):
            return cached(PackedSource(path, limit, patience_s), cache)
        listing = list_folder(path)
    if limit > 0:
        listing = listing.first(limit)
    return cached(FileSource(listing, patience_s), cache)


def fingerprint(source: Source) -> str:
    """Hash, 16 hex digits, of the images' names below their common folder and the sizes of up to 1,000 of their files.

    It is equal wherever the same dataset lies, and looks into no file: that would take too long for a million.
    """
    names = [source.name(i) for i in range(len(source))]
    start = len(os.path.commonpath([os.path.dirname(min(names)), os.path.dirname(max(names))]))  # noqa: PTH120
    digest = hashlib.sha256()
    for name in names:
        digest.update(name[start:].encode("utf-8", "surrogateescape") + b"\n")
    for i in range(0, len(names), -(-len(names) // _SIZES)):
        with contextlib.suppress(OSError, AttributeError):  # built-in images are no files
            digest.update(b"%d\n" % source.file_bytes(i))  # type: ignore[attr-defined]
    return digest.hexdigest()[:16]


def _split_folder(path: Path, split: str) -> Path:
    if not path.is_dir():
        raise UserError(f"data folder {path} does not exist: give a folder of images, or a file that lists them")
    if split:
        folder = path / split
        if not folder.is_dir():
            raise UserError(f"{path} has no folder {split}/: make one, or point to data that is split")
        return folder
    if (path / "train").is_dir() and any((path / name).is_dir() for name in ("val", "test")):
        logger.info("%s is split: using its train/", path)
        return path / "train"
    return path
