"""Runs a script that may take so many more bytes of memory than it has: with_memory.py MIB SCRIPT FLAGS.

At the end it prints by how many MiB the memory it holds had grown at most.
"""

from __future__ import annotations

import resource
import runpy
import sys
from pathlib import Path

import torch


def resident() -> float:
    """MiB that this process holds in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def peak() -> float:
    """The same at its highest so far."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**10


if __name__ == "__main__":
    torch.zeros(64, 64) @ torch.zeros(64, 64)
    began = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far begins anew
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[1]) * 2**20, hard))
    sys.argv = sys.argv[2:]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        print(f"grown by {peak() - began:.0f} MiB", flush=True)
