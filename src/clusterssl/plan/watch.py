"""Counts what a piece of code allocates and what it sends to other ranks, operation by operation."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PACKAGE = Path(__file__).resolve().parents[1]
_TELLING = ("forward", "backward", "all_gather_later", "all_gather_cat")
_KINDS = {"allreduce_": "all-reduce", "allgather_": "all-gather", "broadcast_": "broadcast"}


class Message(NamedTuple):
    """One collective."""

    part: str
    """module of the package, or script, that asked for it"""
    kind: str
    """all-reduce, all-gather or broadcast"""
    nbytes: int
    """of one rank's contribution"""
    ranks: int = 0
    """that take part; 0: all"""
    waited: bool = True
    """whether the code that asked went on only when it was done"""


class Watch(TorchDispatchMode):
    """Inside the block: bytes of living tensors and their peak, and the collectives.

    Works on real tensors as on those of torch's FakeTensorMode, which have no memory: numbers taken from
    these are 1, truths false.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.messages: list[Message] = []
        self._storages: dict[int, weakref.ref[Any]] = {}
        self._awaiting_backward: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._hear(func._opname, args)
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return False if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._storages or tensor.device.type == "meta":
            return

        def gone(_: Any) -> None:
            self.live -= nbytes
            self._storages.pop(key, None)

        self._storages[key] = weakref.ref(storage, gone)
        self.live += nbytes
        self.peak = max(self.peak, self.live)

    def _hear(self, operation: str, args: Sequence[Any]) -> None:
        if operation not in _KINDS:
            return
        sent = args[1] if operation == "allgather_" else args[0]  # all-gather names its output first
        part, function = _asker()
        waited = function != "all_gather_later"
        if function == "forward":
            self._awaiting_backward.append(part)
        elif function == "backward":  # autograd asks, for the latest forward pass that has not been answered
            part = self._awaiting_backward.pop()
        self.messages.append(Message(part, _KINDS[operation], sum(x.nbytes for x in tree_leaves(sent)), waited=waited))


def _asker() -> tuple[str, str]:
    """Module whose code leads to this collective, and the function of `dist` it called, if that tells something."""
    frame, function = sys._getframe(1), ""
    while frame.f_back is not None:
        frame = frame.f_back
        path = Path(frame.f_code.co_filename)
        if path == PACKAGE / "dist.py":
            function = frame.f_code.co_name if frame.f_code.co_name in _TELLING else function
        elif function == "backward":
            return "", function
        elif path.name.startswith("main_") or (path.is_relative_to(PACKAGE) and path.parent.name != "plan"):
            return path.stem, function
    return "", function


def tensor_bytes(tree: Any) -> int:
    """Bytes of the distinct storages of all tensors in nested containers."""
    storages = {
        leaf.untyped_storage()._cdata: leaf.untyped_storage().nbytes()
        for leaf in tree_leaves(tree)
        if isinstance(leaf, torch.Tensor)
    }
    return sum(storages.values())
