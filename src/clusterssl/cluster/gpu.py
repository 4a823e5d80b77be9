"""Whether tensors go to the kernels written in Triton."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor


def for_kernels(x: Tensor) -> bool:
    """float32 on a GPU with TensorFloat-32 units (Ampere and later), and Triton is there to compile for it."""
    return x.is_cuda and x.dtype == torch.float32 and _compiles_for(x.device)


@functools.cache
def _compiles_for(device: torch.device) -> bool:
    return importlib.util.find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (8, 0)
