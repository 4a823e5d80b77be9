"""Processes that share a list of independent tasks, and end with the process that began them, however it ends."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection, get_context, parent_process, resource_tracker
from typing import Any

from clusterssl import pulse
from clusterssl.data.loader import quiet_worker, signals_held
from clusterssl.errors import UserError

_POLL_S = 0.1


def done_by(workers: int, task: Callable[[int], int], numbers: Sequence[int]) -> Iterator[int]:
    """What `task` returns of each number, as it is done; meanwhile `pulse.poll` is called.

    Args:
        workers: processes; they end at once when the iteration is left, and within seconds when this process is killed.
        task: can be pickled.
        numbers: what to call it with.

    Raises:
        UserError: a process was killed, or one of `task`.
    """
    workers = min(workers, len(numbers))
    if workers <= 1:
        yield from map(task, numbers)
        return
    waiting = list(reversed(numbers))
    resource_tracker.ensure_running()  # it would let signals through while they are held
    context = get_context("spawn")
    crew: dict[connection.Connection, Any] = {}
    try:
        with signals_held():
            for _ in range(workers):
                here, there = context.Pipe()
                crew[here] = context.Process(target=_serve, args=(there, task), daemon=True)
                crew[here].start()
                there.close()
        for end in crew:
            end.send(waiting.pop())
        busy = set(crew)
        while busy:
            pulse.poll()
            ready = connection.wait(list(busy), _POLL_S)
            for end in [end for end in crew if end in ready]:
                yield _answer(end, crew[end])
                if waiting:
                    end.send(waiting.pop())
                else:
                    busy.remove(end)
    finally:
        for process in crew.values():
            process.kill()
        for process in crew.values():
            process.join()


def _answer(end: connection.Connection, process: Any) -> int:
    try:
        answer = end.recv()
    except (EOFError, OSError):
        process.join()
        if process.exitcode > 0:
            raise RuntimeError("a process failed, its trace is above") from None
        raise UserError(
            "a process that packs was killed, maybe for its memory; run the same command again, with fewer --workers"
        ) from None
    if isinstance(answer, Exception):
        raise answer
    return int(answer)


def _serve(end: connection.Connection, task: Callable[[int], int]) -> None:
    """A process of the crew."""
    quiet_worker(0)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            end.send(task(end.recv()))
        except (UserError, OSError) as error:
            end.send(error)


def _end_with_parent() -> None:
    """A task would go on alone, and hold the output of the command open."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
