"""Long computations over all images pause for a moment now and then, to hear whether the run has to end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

_listening: list[Callable[[], None]] = []


@contextmanager
def listening(heed: Callable[[], None]) -> Iterator[None]:
    """While in the context, `tick` calls `heed`, a collective that may raise, on all ranks alike."""
    _listening.append(heed)
    try:
        yield
    finally:
        _listening.pop()


def tick() -> None:
    """A place where the computation may end, reached by all ranks equally often; a collective call."""
    if _listening:
        _listening[-1]()
