"""Shares of one loop on several cores, each of which computes on its own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")

MOST = 16
"""threads; each may hold buffers and sums of its own"""


def on_cores(work: Callable[[int, int], T], total: int) -> list[T]:
    """Results of `work(start, stop)` for contiguous shares of `total` rows, one on each core that torch may use.

    A loop of many small operations that torch spreads over the cores makes them wait for each other at every one of
    them, which on a machine with other work takes longer than the operations.

    Args:
        work: computes one share; runs in a thread of its own, in which torch uses one core.
        total: rows, at least 0; no more threads are used than there are rows.
    """
    threads = torch.get_num_threads()
    workers = max(1, min(threads, MOST, total))
    if workers == 1:
        return [work(0, total)]

    def share(worker: int) -> T:
        torch.set_num_threads(max(1, threads // workers))  # of this thread and of those begun later
        return work(worker * total // workers, (worker + 1) * total // workers)

    try:
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(share, range(workers)))
    finally:
        torch.set_num_threads(threads)
