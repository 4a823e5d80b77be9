"""Timing calls in turns, so that whatever else the machine does meets all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any, NamedTuple

import torch

from clusterssl import dist


class Spread(NamedTuple):
    """Seconds of one call."""

    median: float
    low: float
    """first quartile"""
    high: float
    """third quartile"""
    cpu: float
    """median of the processor time of all threads of this process, which depends less on what else the machine does"""


def in_turns(
    calls: Mapping[str, Callable[..., Any]],
    repeats: int,
    warmup: int = 1,
    fresh: Callable[[], Any] | None = None,
    in_a_row: int = 1,
) -> dict[str, Spread]:
    """Seconds of each call over `repeats` rounds in which every call has one turn, after `warmup` rounds untimed.

    Every call is handed what `fresh` returns, made outside the time measured. The order turns round by round, so that
    no call always follows the same other; ranks begin every call together. A turn has so many calls in a row, of which
    the mean counts: a GPU is at work on one while the host prepares the next, as in training.
    """
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(warmup + repeats):
        for name in names if turn % 2 else reversed(names):
            handed = [() if fresh is None else (fresh(),) for _ in range(in_a_row)]
            _settle()
            began, worked = time.perf_counter(), time.process_time()
            for given in handed:
                calls[name](*given)
            _settle(meet=False)
            if turn >= warmup:
                taken = time.perf_counter() - began, time.process_time() - worked
                seconds[name].append((taken[0] / in_a_row, taken[1] / in_a_row))
    return {name: _spread(times) for name, times in seconds.items()}


def _settle(meet: bool = True) -> None:
    if meet:
        dist.barrier()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _spread(times: list[tuple[float, float]]) -> Spread:
    ordered, quarter = sorted(clock for clock, _ in times), len(times) // 4
    return Spread(median(ordered), ordered[quarter], ordered[-1 - quarter], median(cpu for _, cpu in times))
