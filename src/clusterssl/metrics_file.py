"""metrics.jsonl: records that are appended, whole after a kill, and on the disk before a checkpoint that knows them."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from io import FileIO
from pathlib import Path
from typing import Any


class MetricsFile:
    """One record a line; the thread that writes checkpoints may call `sync` at any time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: FileIO | None = None
        self._unwritten = b""
        self._lock = threading.Lock()

    def append(self, record: dict[str, Any]) -> None:
        """Write a record of plain values; what a full disk refuses is written later."""
        with self._lock:
            if self._file is None:
                self._unwritten = b"\n" if ends_within_line(self.path) else b""  # a kill may have cut the last line
                self._file = self.path.open("ab", buffering=0)
            self._unwritten += (json.dumps({"time": round(time.time(), 3), **record}) + "\n").encode()
            with contextlib.suppress(OSError):  # a full disk stops the run when it saves, if it is full by then
                self._write()

    def sync(self) -> None:
        """Bring all records to the disk: a checkpoint never knows more steps than this file, even after a power cut.

        Raises:
            OSError: they could not be written.
        """
        with self._lock:
            if self._file is None:
                return
            self._write()
            copy = os.dup(self._file.fileno())
        try:  # records are appended meanwhile: training must not wait for the disk
            os.fsync(copy)
        finally:
            os.close(copy)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def _write(self) -> None:
        while self._file is not None and self._unwritten:
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]


def ends_within_line(path: Path) -> bool:
    """Whether the last line of a file was cut short."""
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"
