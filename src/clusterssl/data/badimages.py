"""The ledger of unreadable images: counted, named in bad_images.txt, and the reason to stop when there are too many."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from clusterssl.data.source import Source
from clusterssl.errors import UserError

try:
    import fcntl
except ImportError:  # not on Windows; there ranks may list an image twice
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)


class BadImages:
    """Unreadable images of one source, each once; shared by the ranks of a run and kept over restarts by its file."""

    def __init__(self, source: Source, path: Path | str | None = None, *, max_bad_fraction: float = 0.1) -> None:
        """Reads what an earlier launch has listed.

        Args:
            source: whose images.
            path: the list to keep, usually bad_images.txt in the run directory; None: none.
            max_bad_fraction: part of the dataset that may be unreadable before `add` raises.
        """
        self.source = source
        self.path = Path(path) if path is not None else None
        self.max_bad_fraction = max_bad_fraction
        self._seen: set[int] = set()
        self._names: set[str] = set()
        self._read()

    @property
    def count(self) -> int:
        """Unreadable images known so far."""
        return len(self._names)

    @property
    def fraction(self) -> float:
        """Unreadable part of the dataset as far as known."""
        return self.count / max(len(self.source), 1)

    def add(self, bad: Iterable[tuple[int, str]]) -> None:
        """Enters unreadable images (dataset position, reason).

        Raises:
            UserError: more than `max_bad_fraction` of the dataset is unreadable.
        """
        new = {i: reason for i, reason in bad if i not in self._seen}
        if not new:
            return
        self._seen.update(new)
        self._write([(_one_line(self.source.name(i)), _one_line(reason)) for i, reason in new.items()])
        if self.fraction > self.max_bad_fraction:
            where = f", listed in {self.path}" if self.path is not None else ""
            first = next(iter(new))
            raise UserError(
                f"{self.count} of {len(self.source)} images cannot be read{where} (last: {self.source.name(first)}: "
                f"{new[first]}); repair them or raise --max_bad_fraction ({self.max_bad_fraction:g})"
            )

    def _write(self, entries: list[tuple[str, str]]) -> None:
        try:
            with self._locked():
                self._read()
                entries = [entry for entry in entries if entry[0] not in self._names]
                if self.path is not None and entries:
                    with self.path.open("a", encoding="utf-8", errors="surrogateescape") as file:
                        file.write("".join(f"{name}\t{reason}\n" for name, reason in entries))
        except OSError as error:  # a full disk is no reason to end a run here
            logger.warning("cannot write %s: %s", self.path, error.strerror)
        for name, reason in entries:
            logger.warning("unreadable image replaced by its neighbour: %s: %s", name, reason)
            self._names.add(name)

    def _read(self) -> None:
        if self.path is not None and self.path.is_file():
            lines = self.path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
            self._names.update(line.split("\t")[0] for line in lines if line)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keeps other ranks from listing the same image at the same moment."""
        if self.path is None or fcntl is None:
            yield
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _one_line(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")
