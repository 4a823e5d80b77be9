"""Signs of life: long computations pause now and then to hear whether the run has to end, and show that they move."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

_listening: list[Callable[[], None]] = []
_polled: list[Callable[[], None]] = []
_last: tuple[float, str] = (time.monotonic(), "the start")


def listening(heed: Callable[[], None]) -> AbstractContextManager[None]:
    """While in the context, `tick` calls `heed`, a collective that may raise, on all ranks alike."""
    return _within(_listening, heed)


def tick() -> None:
    """A place where the computation may end, reached by all ranks equally often; a collective call."""
    beat()
    if _listening:
        _listening[-1]()


def polled(check: Callable[[], None]) -> AbstractContextManager[None]:
    """While in the context, `poll` calls `check`, which may raise on this rank."""
    return _within(_polled, check)


@contextmanager
def _within(calls: list[Callable[[], None]], call: Callable[[], None]) -> Iterator[None]:
    calls.append(call)
    try:
        yield
    finally:
        calls.pop()


def poll(place: str = "") -> None:
    """As `beat`, where no collective is possible: what it raises its caller tells all ranks, `dist.raise_together`."""
    beat(place)
    if _polled:
        _polled[-1]()


def beat(place: str = "") -> None:
    """Show that this process moves; `place` says in words where it is, where that has changed."""
    global _last
    _last = (time.monotonic(), place or _last[1])


def last() -> tuple[float, str]:
    """When this process last showed that it moves, by `time.monotonic`, and where."""
    return _last
