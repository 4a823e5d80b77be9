"""Copies of a state on the CPU, so that training can go on while the copy is written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Snapshots:
    """Takes copies into memory that it keeps: the first costs a state's size, those after it nothing more.

    A copy is valid until the next one is taken.
    """

    def __init__(self) -> None:
        self._kept: list[Tensor] = []
        self._used = 0
        self._copied: Any = None

    def take(self, state: Any) -> Any:
        """A copy of nested dictionaries, lists and tuples of tensors and plain values, the tensors on the CPU.

        A GPU is not waited for: `wait` does that, in the thread that reads the copy.
        """
        self._used, self._copied = 0, None
        copy = self._copy(state)
        del self._kept[self._used :]
        if self._copied is not None:
            self._copied.record()
        return copy

    def wait(self) -> None:
        """Return when the last copy is complete; any thread may call it."""
        if self._copied is not None:
            self._copied.synchronize()

    def _copy(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._copy_tensor(value.detach())
        if isinstance(value, dict):
            return {key: self._copy(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._copy(inner) for inner in value)
        return value

    def _copy_tensor(self, tensor: Tensor) -> Tensor:
        on_gpu = tensor.is_cuda
        if on_gpu and self._copied is None:
            self._copied = torch.cuda.Event()
        kept = self._kept[self._used] if self._used < len(self._kept) else None
        if kept is None or (kept.shape, kept.dtype, kept.stride()) != (tensor.shape, tensor.dtype, tensor.stride()):
            kept = torch.empty_like(tensor, device="cpu", pin_memory=on_gpu)
            self._kept[self._used : self._used + 1] = [kept]
        self._used += 1
        return kept.copy_(tensor, non_blocking=on_gpu)
