"""torch.compile as --compile uses it: a compiler is there, graphs stay whole, and where they do not it is said."""

from __future__ import annotations

import importlib.util
import logging

import torch
from torch import nn
from torch._dynamo.utils import counters

from clusterssl.errors import UserError

logger = logging.getLogger(__name__)

_MOST_GRAPHS = 64
"""of one module; the default is soon used up by crop sizes, modes and last batches, and then nothing is compiled"""


def require_compiler(device: torch.device) -> None:
    """Raises UserError: torch.compile finds no compiler for this kind of device."""
    if device.type == "cuda":
        needed, found = "the package triton", importlib.util.find_spec("triton") is not None
    else:
        needed, found = "a C++ compiler (g++)", _finds_cpp_compiler()
    if not found:
        raise UserError(f"--compile: needs {needed}, which is not found; install it or leave --compile away")


def _finds_cpp_compiler() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return bool(get_cpp_compiler())
    except Exception:  # its kind differs by version
        return False


def compile_module(module: nn.Module) -> None:
    """Compiles the forward pass in place: one graph for each shape of the input.

    Where Python comes between two graphs, a line in the log says so and why.
    """
    config = torch._dynamo.config
    setattr(config, "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit", _MOST_GRAPHS)
    module.compile(dynamic=False)
    torch._dynamo.callback.on_compile_end(_tell_breaks)


_told: set[str] = set()


def _tell_breaks(*_: object) -> None:
    for reason in counters["graph_break"]:
        line = " ".join(str(reason).split())
        if line not in _told:
            _told.add(line)
            logger.warning("--compile: the graph is broken, which costs speed: %.300s", line)
