"""Runs a function on several ranks of this machine, joined as a run's ranks are."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp

from clusterssl import dist, joining
from clusterssl.pretrain import keep_freed_memory


def on_ranks(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Results of `fn(*args)` in rank order; plain values only. Ranks have one thread each; one rank has all cores."""
    if world_size == 1:
        return [fn(*args)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_rank, (world_size, port, results, fn, args), nprocs=world_size)
    answers = dict(results.get() for _ in range(world_size))
    return [answers[rank] for rank in range(world_size)]


def _rank(rank: int, world_size: int, port: str, results: Any, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    place = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_PORT=port)
    torch.set_num_threads(1)
    keep_freed_memory()
    joining.join(device="cpu")
    results.put((rank, fn(*args)))
    dist.leave()
