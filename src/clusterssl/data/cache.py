"""Keeps images in memory, shared with the workers: small ones decoded, of others the files.

A CIFAR or Tiny ImageNet JPEG takes longer to open and decode than to crop. Anonymous shared memory is seen by forked
workers and, unlike /dev/shm, is not capped at 64 MB in containers; pages are taken up as images are first read.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clusterssl import dist
from clusterssl.data.decode import BadImageError, decode
from clusterssl.errors import UserError
from clusterssl.room import HOST, usable_bytes

Cache = Literal["auto", "ram", "device", "none"]
MAX_IMAGE_BYTES = 3 * 96 * 96
MAX_BYTES = 2**30
_PROBES = 8


class _Cache:
    """What a source with a cache has of the source."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.classes: list[str] = inner.classes
        self.labels: NDArray[np.int64] = inner.labels

    def __len__(self) -> int:
        return len(self.inner)

    def name(self, i: int) -> str:
        """Name of image i."""
        return self.inner.name(i)

    def file_bytes(self, i: int) -> int:
        """Size of the file of image i."""
        return self.inner.file_bytes(i)


class CachedSource(_Cache):
    """A source whose images are decoded once; those of another size than the first are decoded every time."""

    def __init__(self, inner: Any, shape: tuple[int, ...]) -> None:
        super().__init__(inner)
        self._shape = shape
        self._allocate()

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


class CachedFiles(_Cache):
    """A source whose files are read once and decoded every time: they take a tenth of the memory of their pixels."""

    def __init__(self, inner: Any) -> None:
        """Args: a source of files with `file_bytes` and `read`."""
        super().__init__(inner)
        self._ends = np.cumsum([_size(inner, i) for i in range(len(inner))], dtype=np.int64)
        _check_memory(int(self._ends[-1]))
        self._allocate()

    def load(self, i: int) -> Tensor:
        """Decodes image i, uint8 [3, H, W]."""
        return decode(self.read(i))

    def read(self, i: int) -> NDArray[np.uint8]:
        """Bytes of the file of image i, uint8 [n]; maybe a view of the cache, not to be written to."""
        kept = self._data[int(self._ends[i - 1]) if i else 0 : int(self._ends[i])]
        if self._filled[i]:
            return kept
        data = self.inner.read(i)
        if len(data) == len(kept):
            kept[:] = data
            self._filled[i] = 1  # last, so that no other worker sees half a file
        return data

    def _allocate(self) -> None:
        n, size = len(self.inner), int(self._ends[-1])
        memory = mmap.mmap(-1, size + n)
        self._data = np.frombuffer(memory, dtype=np.uint8, count=size)
        self._filled = np.frombuffer(memory, dtype=np.uint8, count=n, offset=size)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_data", "_filled")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Starts empty: memory is shared with forked workers only."""
        self.__dict__.update(state)
        self._allocate()


def cached(source: Any, cache: Cache) -> Any:
    """A source of files, with a cache where there shall be one.

    Args:
        source: images in files.
        cache: "auto" keeps decoded images if they are small and 1 GiB holds all, as its first readable image says;
            "ram" keeps small images decoded, of others the files, whatever memory that takes; "none" keeps nothing;
            "device" keeps what "auto" does, for all but the training crops, which come from `resident`.

    Raises:
        UserError: "ram", and this machine's memory does not hold all images once for each of its ranks.
    """
    if cache == "none":
        return source
    shape = _first_shape(source)
    small = shape is not None and math.prod(shape) <= MAX_IMAGE_BYTES
    if cache == "ram" and not small:
        return CachedFiles(source)
    if shape is None or not small:
        return source
    wanted = math.prod(shape) * len(source)
    if cache == "ram":
        _check_memory(wanted)
    return CachedSource(source, shape) if cache == "ram" or wanted <= MAX_BYTES else source


def _first_shape(source: Any) -> tuple[int, ...] | None:
    for i in range(min(_PROBES, len(source))):
        with contextlib.suppress(BadImageError):
            return tuple(source.load(i).shape)
    return None


def _size(source: Any, i: int) -> int:
    try:
        return int(source.file_bytes(i))
    except OSError:  # told when the image is to be loaded
        return 0


def _check_memory(wanted: int) -> None:
    usable = usable_bytes(HOST)
    if wanted > usable:
        raise UserError(
            f"--cache ram: a rank needs {wanted / 2**30:.1f} GiB, and each of {dist.local_size()} on this machine may "
            f"take {usable / 2**30:.1f} GiB of its free memory; leave --cache away, or pack smaller images "
            "(python -m clusterssl.data.pack SRC DST --short_side 256)"
        )
