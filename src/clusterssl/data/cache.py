"""Keeps small decoded images in memory, shared with the workers.

A CIFAR or Tiny ImageNet JPEG takes longer to open and decode than to crop. Anonymous shared memory is seen by forked
workers and, unlike /dev/shm, is not capped at 64 MB in containers; pages are taken up as images are first read.
"""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clusterssl.data.decode import BadImageError

MAX_IMAGE_BYTES = 3 * 96 * 96
MAX_BYTES = 2**30
_PROBES = 8


class CachedSource:
    """A source whose images are decoded once; those of another size than the first are decoded every time."""

    def __init__(self, inner: Any, shape: tuple[int, ...]) -> None:
        self.inner = inner
        self.classes: list[str] = inner.classes
        self.labels: NDArray[np.int64] = inner.labels
        self._shape = shape
        self._allocate()

    def __len__(self) -> int:
        return len(self.inner)

    def name(self, i: int) -> str:
        """Name of image i."""
        return self.inner.name(i)

    def file_bytes(self, i: int) -> int:
        """Size of the file of image i."""
        return self.inner.file_bytes(i)

    def load(self, i: int) -> Tensor:
        """Image i, uint8 [3, H, W]; may be a view of the cache, not to be written to."""
        if self._filled[i]:
            return self._images[i]
        image = self.inner.load(i)
        if tuple(image.shape) == self._shape:
            self._images[i] = image
            self._filled[i] = 1  # last, so that no other worker sees half an image
        return image

    def _allocate(self) -> None:
        n = len(self.inner)
        size = n * int(np.prod(self._shape))
        memory = mmap.mmap(-1, size + n)
        self._images = torch.frombuffer(memory, dtype=torch.uint8, count=size).view(n, *self._shape)
        self._filled = np.frombuffer(memory, dtype=np.uint8, count=n, offset=size)

    def __getstate__(self) -> dict[str, Any]:
        return {"inner": self.inner, "shape": self._shape}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Starts empty: memory is shared with forked workers only."""
        self.__init__(state["inner"], state["shape"])  # type: ignore[misc]


def cached_if_small(source: Any) -> Any:
    """The source with a cache if its first readable image says that all of them fit into memory, else as it is."""
    for i in range(min(_PROBES, len(source))):
        try:
            image = source.load(i)
        except BadImageError:
            continue
        small = image.numel() <= MAX_IMAGE_BYTES and image.numel() * len(source) <= MAX_BYTES
        return CachedSource(source, tuple(image.shape)) if small else source
    return source
