"""torch.compile as --compile uses it: a compiler is there, graphs stay whole, and where they do not it is said.

--cuda_graphs has their kernels replayed in one launch, which pays where a kernel is shorter than its launch.
"""

from __future__ import annotations

import importlib.util
import logging

import torch
from torch import nn

from clusterssl.dist import World
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
        raise UserError(f"--compile: needs {needed}, which is not found; install it or leave --compile out")


def _finds_cpp_compiler() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return bool(get_cpp_compiler())
    except Exception:  # its kind differs by version
        return False


def require_cuda_graphs(world: World, accumulate: int) -> None:
    """Raises UserError: no single GPU, or gradients that outlive the pass that the next one writes over."""
    if world.device.type != "cuda" or world.size > 1:
        found = f"{world.size} ranks" if world.size > 1 else "a CPU"
        raise UserError(f"--cuda_graphs: is for one process on one GPU, here {found}; leave --cuda_graphs out")
    if accumulate > 1:
        raise UserError(f"--cuda_graphs: cannot add gradients up over --accumulate {accumulate}; leave one of them out")


def compile_module(module: nn.Module, cuda_graphs: bool = False) -> None:
    """Compiles the forward pass in place: one graph for each shape of the input.

    Where Python comes between two graphs, a line in the log says so and why.

    Args:
        module: whose input is one tensor.
        cuda_graphs: replay forward and backward passes as CUDA graphs (torch's "reduce-overhead"). What a pass without
            gradients gives is kept by its callers beyond the next one, which would write over it: it stays eager.
    """
    config = torch._dynamo.config
    setattr(config, "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit", _MOST_GRAPHS)
    if cuda_graphs:
        eager = module.forward
        replayed = torch.compile(eager, dynamic=False, mode="reduce-overhead")
        module.forward = lambda x: replayed(x) if torch.is_grad_enabled() else eager(x)
    else:
        module.compile(dynamic=False)
    torch._dynamo.callback.on_compile_end(_tell_breaks)


_told: set[str] = set()


def _tell_breaks(*_: object) -> None:
    from torch._dynamo.utils import counters  # which takes seconds to import

    for reason in counters["graph_break"]:
        line = " ".join(str(reason).split())
        if line not in _told:
            _told.add(line)
            logger.warning("--compile: the graph is broken, which costs speed: %.300s", line)
