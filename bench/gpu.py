"""What a GPU did: kernels, memory and waits of a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from clusterssl.errors import UserError

IN_A_ROW = 10
"""calls between two looks at the clock"""
GEMM = ("gemm", "cutlass", "cublas", "splitk", "nvjet")
"""parts of the names of kernels that multiply matrices and write the product"""


def kernels(call: Callable[[], Any]) -> list[str]:
    """Names of what a call launches on the GPU, in order.

    Raises:
        UserError: the profiler sees nothing.
    """
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    names = [event.name for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    if not names:
        raise UserError(
            "the profiler sees no kernel: allow it to read the GPU's activity (CUPTI), or leave --device cuda"
        )
    return names


def products_written(names: list[str]) -> int:
    """How many of the kernels multiply matrices and write the product to memory."""
    return sum(any(part in name.lower() for part in GEMM) for name in names)


def memory(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """GiB each call takes on the GPU at its highest, beyond what lies there before it."""
    found = {}
    for name, call in calls.items():
        call()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        found[name] = (torch.cuda.max_memory_allocated() - before) / 2**30
    return found


def never_waits(step: Callable[[], Any], steps: int = 3) -> bool:
    """Whether steps run through while every wait for the GPU is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(steps):
            step()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        print(f"ours waits for the GPU: {error}")
        return False
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return True
