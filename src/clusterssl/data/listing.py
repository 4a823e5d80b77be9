"""Finding image files: class folders, flat folders and list files, in an order that never changes.

Names are kept as one block of bytes: a million Python strings would be copied into every worker bit by bit as their
reference counts change.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clusterssl.errors import UserError

logger = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""What counts as an image file, in any case; the list of torchvision's ImageFolder."""


class Names:
    """Many file names below one root, compactly."""

    def __init__(self, root: str, names: Sequence[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self.root = root
        self.blob = b"".join(encoded)
        self.ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)

    @classmethod
    def of_bytes(cls, root: str, blob: bytes, ends: NDArray[np.int64]) -> Names:
        """From all names behind one another and where each ends."""
        names = cls(root, ())
        names.blob, names.ends = blob, ends
        return names

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> str:
        start = int(self.ends[i - 1]) if i else 0
        return os.fsdecode(os.fsencode(self.root) + b"/" + self.blob[start : int(self.ends[i])])


@dataclass(frozen=True)
class Listing:
    """The images of a folder or list."""

    names: Names
    labels: NDArray[np.int64]
    classes: list[str]

    def first(self, limit: int) -> Listing:
        """The first `limit` images."""
        return replace(self, labels=self.labels[:limit])


def list_folder(folder: Path) -> Listing:
    """Lists a folder: one class per subfolder, or unlabelled when pictures lie directly in it.

    The order is that of torchvision's ImageFolder: by class, folder, then name.

    Raises:
        UserError: unreadable, or no images in it.
    """
    try:
        found = list(_walk(str(folder), "", ()))
    except OSError as error:
        raise UserError(f"cannot read the data folder {error.filename}: {error.strerror}") from error
    if not found:
        told = " ".join(EXTENSIONS)
        what = "is empty" if not any(folder.iterdir()) else f"holds no images (read are {told})"
        raise UserError(f"data folder {folder} {what}: give a folder of images")
    if any(inner == "" for inner, _ in found):
        found.sort()
        names = [f"{inner}/{name}" if inner else name for inner, name in found]
        return Listing(Names(str(folder), names), np.full(len(names), -1, dtype=np.int64), [])
    found.sort(key=lambda item: (item[0].split("/")[0], item[0], item[1]))
    tops = [inner.split("/")[0] for inner, _ in found]
    classes = sorted(set(tops))
    number = {name: i for i, name in enumerate(classes)}
    labels = np.array([number[top] for top in tops], dtype=np.int64)
    return Listing(Names(str(folder), [f"{inner}/{name}" for inner, name in found]), labels, classes)


def _walk(root: str, inner: str, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, str]]:
    """Yields (folder below root, file name) of all images; follows links, skips hidden entries and loops of links."""
    path = f"{root}/{inner}" if inner else root
    status = os.stat(path)  # noqa: PTH116 - a Path per folder is slow on a million files
    here = (status.st_dev, status.st_ino)
    if here in above:
        logger.warning("%s links back to a folder above it: not entered again", path)
        return
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _walk(root, f"{inner}/{entry.name}" if inner else entry.name, (*above, here))
            elif entry.name.lower().endswith(EXTENSIONS) and (entry.is_file() or entry.is_symlink()):
                yield inner, entry.name


def list_file(path: Path) -> Listing:
    """Reads a list: one path per line, relative to the list's folder, optionally a tab or space and a label.

    Raises:
        UserError: unreadable, or no path in it.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    except OSError as error:
        raise UserError(f"cannot read the list {path}: {error.strerror}") from error
    pairs = [_split_label(line) for line in lines if line.strip()]
    if not pairs:
        raise UserError(f"the list {path} names no files: write one path per line")
    told = {label for _, label in pairs if label is not None}
    numeric = all(label.lstrip("-").isdigit() for label in told)
    classes = sorted(told, key=lambda label: (int(label) if numeric else 0, label))
    number: dict[str | None, int] = {label: i for i, label in enumerate(classes)}
    labels = np.array([number.get(label, -1) for _, label in pairs], dtype=np.int64)
    names = [str(path.parent.absolute() / name) for name, _ in pairs]
    return Listing(Names("", [name.lstrip("/") for name in names]), labels, classes)


def _split_label(line: str) -> tuple[str, str | None]:
    """Splits at the last tab; else at the last space if what precedes it already looks like an image file."""
    line = line.strip()
    for separator in ("\t", " "):
        head, found, tail = line.rpartition(separator)
        if found and (separator == "\t" or head.rstrip().lower().endswith(EXTENSIONS)):
            return head.strip(), tail.strip()
    return line, None
