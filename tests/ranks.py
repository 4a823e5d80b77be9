"""Runs a function on several real processes joined by gloo, for tests of everything distributed."""

from __future__ import annotations

import io
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist

from tests.forked import server


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Results of `fn(rank, world_size, *args)` in rank order; `fn` is a top-level function of a test module."""
    context = server()
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = (Path(folder) / "rendezvous").as_uri()
        processes = [
            context.Process(target=_child, args=(fn, rank, world_size, rendezvous, results, args), daemon=True)
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        answers = dict(results.get(timeout=300) for _ in processes)  # a rank that died cannot answer
        for process in processes:
            process.join(timeout=60)
    failures = [f"rank {rank}:\n{value[1]}" for rank, value in sorted(answers.items()) if value[0] == "error"]
    if failures:
        raise AssertionError("\n".join(failures))
    return [torch.load(io.BytesIO(answers[rank][1]), weights_only=False) for rank in range(world_size)]


def _child(
    fn: Callable[..., Any], rank: int, world_size: int, rendezvous: str, results: Any, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    try:
        torch_dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
        packed = io.BytesIO()  # plain bytes: shared tensors would vanish with this process
        torch.save(fn(rank, world_size, *args), packed)
        results.put((rank, ("ok", packed.getvalue())))
        torch_dist.barrier()
        torch_dist.destroy_process_group()
    except BaseException:
        results.put((rank, ("error", traceback.format_exc())))
