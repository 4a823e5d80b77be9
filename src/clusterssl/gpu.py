"""Whether tensors go to the kernels written in Triton."""

from __future__ import annotations

import functools
import importlib.util

import torch


def for_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """float32 on a GPU with TensorFloat-32 units (Ampere and later), and Triton is there to compile for it."""
    return device.type == "cuda" and dtype == torch.float32 and _compiles_for(device)


@functools.cache
def _compiles_for(device: torch.device) -> bool:
    return importlib.util.find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (8, 0)
