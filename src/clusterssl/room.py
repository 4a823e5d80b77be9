"""How much memory a rank may take: of its GPU, and of the host, which the ranks of a machine share."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from clusterssl import dist

USABLE = {"cuda": 0.9, "cpu": 0.8}
"""share of the free memory that may be taken; gaps between blocks, and what others come to need, take the rest"""
HOST = torch.device("cpu")


def usable_bytes(device: torch.device) -> float:
    """Bytes that this rank may take now on a device; infinite where the system does not say."""
    if device.type == "cuda":
        return USABLE["cuda"] * torch.cuda.mem_get_info(device)[0]
    return USABLE["cpu"] * free_bytes() / dist.local_size()


def free_bytes() -> float:
    """Memory of the host that this process may still take up; infinite where the system does not say."""
    free = float("inf")
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024.0 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    with contextlib.suppress(OSError, ValueError):  # containers
        group = Path("/sys/fs/cgroup")
        most, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, most - used)
    with contextlib.suppress(OSError, ValueError, ImportError):  # ulimit -v
        import resource

        most, used = resource.getrlimit(resource.RLIMIT_AS)[0], int(Path("/proc/self/statm").read_text().split()[0])
        if most != resource.RLIM_INFINITY:
            free = min(free, most - used * resource.getpagesize())
    return max(free, 0.0)
