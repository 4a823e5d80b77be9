"""What a power cut leaves of a folder: operations are noted, then every loss that a disk allows is replayed.

The model is that of POSIX, harsher than common file systems: data of a file is on the disk once the file was synced, a
name once its folder was. Before that, each change of a name is there or lost for itself, a rename also without the data
of its file, which then are cut short, zeros, or those of the last sync.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LOSSES = ("nothing", "to the last sync", "cut short", "zeros")
"""what may have become of data that was not synced"""


@dataclass(frozen=True)
class Event:
    """One operation; names are relative to the recorded root."""

    kind: str
    """"set" a name to a file (a number) or folder (-1), "remove" or "move" it; new "data" of a file, "sync" of a file,
    "sync names" of a folder; "mark" """
    name: str = ""
    file: int = -1
    data: bytes = b""
    target: str = ""
    mark: Any = None


@dataclass
class Disk:
    """Names and data at one moment: what is safe, and what is only in the memory of the machine."""

    names: dict[str, int] = field(default_factory=dict)
    pending: list[Event] = field(default_factory=list)
    safe: dict[int, bytes] = field(default_factory=dict)
    memory: dict[int, bytes] = field(default_factory=dict)

    def do(self, event: Event) -> None:
        """Take in the next operation."""
        if event.kind in ("set", "remove", "move"):
            self.pending.append(event)
        elif event.kind == "data":
            self.memory[event.file] = event.data
        elif event.kind == "sync":
            self.safe[event.file] = self.memory.get(event.file, b"")
        elif event.kind == "sync names":
            inside = [one for one in self.pending if (os.path.dirname(one.name) or ".") == event.name]  # noqa: PTH120
            self.pending = [one for one in self.pending if one not in inside]
            _rename(self.names, inside)

    def states(self) -> Iterator[dict[str, bytes | None]]:
        """Every folder that a power cut may leave now: data by name, None for folders."""
        assert len(self.pending) < 12, f"names are not synced: {self.pending}"
        for done in itertools.product((True, False), repeat=len(self.pending)):
            names = dict(self.names)
            _rename(names, [event for event, there in zip(self.pending, done, strict=True) if there])
            reachable = {name: file for name, file in names.items() if _reachable(name, names)}
            unsafe = any(self.memory.get(file, b"") != self.safe.get(file) for file in reachable.values() if file >= 0)
            for loss in LOSSES if unsafe else LOSSES[:1]:
                yield {name: None if file < 0 else self._data(file, loss) for name, file in reachable.items()}

    def _data(self, file: int, loss: str) -> bytes:
        safe, memory = self.safe.get(file, b""), self.memory.get(file, b"")
        if loss == "to the last sync" or safe == memory:
            return safe
        kept = len(safe) if memory.startswith(safe) else 0  # what was appended is lost, the rest was safe
        if loss == "cut short":
            return memory[: (kept + len(memory)) // 2]
        return memory[:kept] + bytes(len(memory) - kept) if loss == "zeros" else memory


class Recorder:
    """Notes what this process does to the files below a folder, while in a `with` block."""

    def __init__(self, root: Path) -> None:
        """Take in what the folder holds; all of that is safe."""
        self.root, self.events, self.start = str(root.resolve()), list[Event](), Disk()
        self._files: dict[str, int] = {}
        self._dirty: dict[int, bytes] = {}
        for path in sorted(root.resolve().rglob("*")):
            name = str(path.relative_to(self.root))
            number = -1 if path.is_dir() else 1_000_000 + path.stat().st_ino  # hard links are one file
            self.start.names[name] = number
            if number >= 0:
                self._files[name] = number
                self.start.safe[number] = self.start.memory[number] = path.read_bytes()
        self._numbers, self._lock, self._busy = itertools.count(), threading.RLock(), 0
        self._fsync = os.fsync

    def __enter__(self) -> Recorder:
        _hear()
        _recorders.append(self)
        os.fsync = self._on_sync  # no audit event tells of it
        return self

    def __exit__(self, *error: object) -> None:
        os.fsync = self._fsync
        _recorders.remove(self)

    def mark(self, mark: Any) -> None:
        """Note that something has been promised."""
        with self._lock:
            self._busy = threading.get_ident()
            self._note_data()
            self._busy = 0
            self.events.append(Event("mark", mark=mark))

    def _inside(self, path: Any) -> str:
        """Relative name; empty for a path outside."""
        if isinstance(path, int) or path is None:
            return ""
        full = os.path.abspath(os.fsdecode(path))  # noqa: PTH100 - must not be resolved
        return full[len(self.root) + 1 :] if full.startswith(self.root + os.sep) else "." * (full == self.root)

    def on_event(self, event: str, words: tuple[Any, ...]) -> None:
        """Called before the operation is done."""
        if self._busy == threading.get_ident() or event not in (
            "open",
            "os.rename",
            "os.link",
            "os.remove",
            "os.mkdir",
        ):
            return
        name = self._inside(words[0])
        if not name:
            return
        with self._lock:
            self._busy = threading.get_ident()
            try:
                self._note_data()
                getattr(self, "_" + event.replace(".", "_"))(name, words)
            finally:
                self._busy = 0

    def _open(self, name: str, words: tuple[Any, ...]) -> None:
        if not words[2] & (os.O_WRONLY | os.O_RDWR):
            return
        if name not in self._files:
            self._files[name] = next(self._numbers)
            self.events.append(Event("set", name, self._files[name]))
        self._dirty.setdefault(self._files[name], self.start.safe.get(self._files[name], b""))

    def _os_rename(self, name: str, words: tuple[Any, ...]) -> None:
        target = self._inside(words[1])
        self._files[target] = self._files.pop(name)
        self.events.append(Event("move", name, self._files[target], target=target))

    def _os_link(self, name: str, words: tuple[Any, ...]) -> None:
        target = self._inside(words[1])
        self._files[target] = self._files[name]
        self.events.append(Event("set", target, self._files[name]))

    def _os_remove(self, name: str, words: tuple[Any, ...]) -> None:
        if os.path.lexists(words[0]):
            del self._files[name]
            self.events.append(Event("remove", name))

    def _os_mkdir(self, name: str, words: tuple[Any, ...]) -> None:
        if not os.path.lexists(words[0]):
            self.events.append(Event("set", name))

    def _note_data(self) -> None:
        names = {number: name for name, number in self._files.items()}
        for number in [number for number in self._dirty if number in names]:
            data = Path(self.root, names[number]).read_bytes()
            if data != self._dirty[number]:
                self._dirty[number] = data
                self.events.append(Event("data", file=number, data=data))

    def _on_sync(self, descriptor: int) -> None:
        name = self._inside(Path(f"/proc/self/fd/{descriptor}").readlink())
        with self._lock:
            if name in self._files:
                self._busy = threading.get_ident()
                self._note_data()
                self._busy = 0
                self.events.append(Event("sync", file=self._files[name]))
            elif name:
                self.events.append(Event("sync names", name))


_recorders: list[Recorder] = []


def _hear() -> None:
    """Install the one audit hook of this process; there is no way to remove it."""
    global _heard
    if not _heard:
        sys.addaudithook(lambda event, words: [one.on_event(event, words) for one in _recorders] and None)
        _heard = True


_heard = False


def _rename(names: dict[str, int], events: list[Event]) -> None:
    for event in events:
        if event.kind == "remove" or event.kind == "move":
            names.pop(event.name, None)
        if event.kind != "remove":
            names[event.target or event.name] = event.file


def _reachable(name: str, names: dict[str, int]) -> bool:
    return all(str(parent) in names for parent in Path(name).parents if str(parent) != ".")


def power_cuts(recorder: Recorder) -> Iterator[tuple[list[Any], Any, dict[str, bytes | None]]]:
    """All different states after all prefixes: what had been marked by then, the mark that comes next, the state."""
    disk, marks, seen = copy.deepcopy(recorder.start), list[Any](), set[bytes]()
    for position, event in enumerate([Event("begin"), *recorder.events]):
        disk.do(event)
        marks += [event.mark] if event.kind == "mark" else []
        coming = next((later.mark for later in recorder.events[position:] if later.kind == "mark"), None)
        for state in disk.states():
            digest = hashlib.sha256(repr((marks, coming)).encode())
            for name, data in sorted(state.items()):
                digest.update(f"{name} {None if data is None else hash(data)};".encode())
            if digest.digest() not in seen:
                seen.add(digest.digest())
                yield list(marks), coming, state


def lay_out(state: dict[str, bytes | None], folder: Path) -> None:
    """Make a folder hold exactly a state."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in sorted(state.items()):
        if data is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(data)
