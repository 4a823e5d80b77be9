"""Some classes of a source, for experiments on a part of a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from clusterssl.errors import UserError

if TYPE_CHECKING:
    from clusterssl.data.source import Source

_SHOWN = 5


class ClassSubset:
    """The images of some classes, in the order of the source; classes are numbered in the order they are named."""

    def __init__(self, inner: Source, classes: list[str]) -> None:
        """Keep `classes` (names, each once) of a labelled source that has them all."""
        self.inner = inner
        self.classes = classes
        number_of = np.full(len(inner.classes) + 1, -1, dtype=np.int64)  # the last entry is for unlabelled images
        number_of[[inner.classes.index(name) for name in classes]] = np.arange(len(classes))
        labels = number_of[inner.labels]
        self._positions = np.flatnonzero(labels >= 0)
        self.labels = labels[self._positions]

    def __len__(self) -> int:
        return len(self._positions)

    def name(self, i: int) -> str:
        """Name of image i."""
        return self.inner.name(int(self._positions[i]))

    def file_bytes(self, i: int) -> int:
        """Size of the file of image i."""
        return self.inner.file_bytes(int(self._positions[i]))  # type: ignore[attr-defined]

    def load(self, i: int) -> Tensor:
        """Image i, as the source gives it."""
        return self.inner.load(int(self._positions[i]))

    def __getattr__(self, name: str) -> Any:
        """`read`, where the source has it: bytes of the file of image i."""
        if name != "read":
            raise AttributeError(name)
        read = self.inner.read  # type: ignore[attr-defined]
        return lambda i: read(int(self._positions[i]))


def class_subset(source: Source, subset_file: str) -> ClassSubset:
    """The images of the classes that a text file names, one a line by its first word.

    Raises:
        UserError: the file cannot be read, is empty, or names a class twice or one that the source does not have.
    """
    try:
        lines = Path(subset_file).expanduser().read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError as error:
        raise UserError(f"--subset_file {subset_file}: cannot be read ({error.strerror})") from error
    names = [line.split()[0] for line in lines if line.strip()]
    if not names:
        raise UserError(f"--subset_file {subset_file}: names no class; write one class name a line")
    known = set(source.classes)
    if not known:
        raise UserError(f"--subset_file {subset_file}: these images have no classes; give a folder of class folders")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(
            f"--subset_file {subset_file}: {len(unknown)} of {len(names)} classes are not in the data "
            f"({_listed(unknown)}); it has {len(known)} ({_listed(source.classes)})"
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"--subset_file {subset_file}: names {_listed(twice)} more than once")
    return ClassSubset(source, names)


def _listed(names: list[str]) -> str:
    more = ", ..." if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
