"""Memory that loader workers share with the main process and use again, batch after batch.

A piece of shared memory of its own for each batch costs the main process a handshake to receive it and, when it lets
go, the release of all its pages; and the worker the zeroing of new ones. Here both see the same pages from the fork on,
and all that travels is a number. A slot is free again when the last tensor that the main process made of it is gone.
"""

from __future__ import annotations

import itertools
import mmap
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

_numbers = itertools.count()
_blocks: weakref.WeakValueDictionary[int, _Block] = weakref.WeakValueDictionary()
"""what a number in a message means, in the process that receives it"""


class _Block:
    def __init__(self, slots: int, size: int) -> None:
        self.stride = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self.memory = mmap.mmap(-1, slots * self.stride + slots)
        self.taken = np.frombuffer(self.memory, dtype=np.uint8, count=slots, offset=slots * self.stride)
        self.number = next(_numbers)
        _blocks[self.number] = self

    def bytes_of(self, slot: int, count: int) -> NDArray[np.uint8]:
        return np.frombuffer(self.memory, dtype=np.uint8, count=count, offset=slot * self.stride)


class Ticket:
    """A filled slot on its way: arrives as a tensor uint8 [count]."""

    def __init__(self, block: int, slot: int, count: int) -> None:
        self._words = block, slot, count

    def __reduce__(self) -> tuple[Callable[..., Tensor], tuple[int, int, int]]:
        return _arrived, self._words


def _arrived(block: int, slot: int, count: int) -> Tensor:
    found = _blocks[block]
    array = found.bytes_of(slot, count)
    weakref.finalize(array, found.taken.__setitem__, slot, 0).atexit = False
    return torch.from_numpy(array)


class Slots:
    """The slots of some workers, each with as many of its own."""

    def __init__(self, workers: int, each: int, size: int) -> None:
        """Args: worker processes, slots of each, bytes of a slot."""
        self._workers, self._each, self._size = workers, each, size
        self.memory: _Block | None = None
        """of the workers that were forked last; what they send is lost with it"""

    def renew(self) -> None:
        """Memory for workers that are about to be forked."""
        self.memory = _Block(self._workers * self._each, self._size)

    def take(self, count: int) -> Tensor | None:
        """A free slot of this worker, uint8 [count]; None in the main process, or where all are in use."""
        worker, block = get_worker_info(), self.memory
        if worker is None or block is None or count > block.stride:
            return None
        own = slice(worker.id * self._each, (worker.id + 1) * self._each)
        free = np.flatnonzero(block.taken[own] == 0)
        if len(free) == 0:
            return None
        slot = own.start + int(free[0])
        block.taken[slot] = 1
        return torch.from_numpy(block.bytes_of(slot, count))

    def ticket(self, buffer: Tensor) -> Ticket | Tensor:
        """What to send instead of a tensor, where it is a slot."""
        if self.memory is None:
            return buffer
        first = self.memory.bytes_of(0, 1).ctypes.data
        slot, inside = divmod(buffer.data_ptr() - first, self.memory.stride)
        if inside or not 0 <= slot < len(self.memory.taken):
            return buffer
        return Ticket(self.memory.number, slot, len(buffer))

    def __getstate__(self) -> dict[str, Any]:
        """Without memory: only forked workers share it."""
        return {**self.__dict__, "memory": None}
