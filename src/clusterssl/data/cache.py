"""Keeps images in memory or on a machine's own disk, shared with the workers: small ones decoded, of others the files.

A CIFAR or Tiny ImageNet JPEG takes longer to open and decode than to crop. Anonymous shared memory is seen by forked
workers and, unlike /dev/shm, is not capped at 64 MB in containers; pages are taken up as images are first read. A file
on disk is shared by all ranks of a machine, too; it has no name, so that it is gone with them however they end.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clusterssl import dist
from clusterssl.data.decode import BadImageError, decode
from clusterssl.errors import UserError
from clusterssl.room import HOST, usable_bytes

Cache = Literal["auto", "ram", "disk", "device", "none"]
T = TypeVar("T")
MAX_IMAGE_BYTES = 3 * 96 * 96
MAX_BYTES = 2**30
_PROBES = 8


class _Cache:
    """What a source with a cache has of the source."""

    def __init__(self, inner: Any, on_disk: bool) -> None:
        self.inner, self.on_disk = inner, on_disk
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

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Memory is shared with forked workers only: elsewhere a cache starts empty, one on disk is left behind."""
        return (_itself, (self.inner,)) if self.on_disk else super().__reduce_ex__(protocol)


def _itself(source: Any) -> Any:
    return source


class CachedSource(_Cache):
    """A source whose images are decoded once; those of another size than the first are decoded every time."""

    def __init__(self, inner: Any, shape: tuple[int, ...], on_disk: bool = False) -> None:
        super().__init__(inner, on_disk)
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
        memory = _memory(size + n, self.on_disk)
        self._images = torch.frombuffer(memory, dtype=torch.uint8, count=size).view(n, *self._shape)
        self._filled = np.frombuffer(memory, dtype=np.uint8, count=n, offset=size)

    def __getstate__(self) -> dict[str, Any]:
        return {"inner": self.inner, "shape": self._shape}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Starts empty."""
        self.__init__(state["inner"], state["shape"])  # type: ignore[misc]


class CachedFiles(_Cache):
    """A source whose files are read once and decoded every time: they take a tenth of the memory of their pixels."""

    def __init__(self, inner: Any, on_disk: bool = False) -> None:
        """Args: a source of files with `file_bytes` and `read`; where they are kept."""
        super().__init__(inner, on_disk)
        self._ends = np.cumsum([_size(inner, i) for i in range(len(inner))], dtype=np.int64)
        if not on_disk:
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
        memory = _memory(size + n, self.on_disk)
        self._data = np.frombuffer(memory, dtype=np.uint8, count=size)
        self._filled = np.frombuffer(memory, dtype=np.uint8, count=n, offset=size)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_data", "_filled")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Starts empty."""
        self.__dict__.update(state)
        self._allocate()


def cached(source: Any, cache: Cache) -> Any:
    """A source of files, with a cache where there shall be one.

    Args:
        source: images in files.
        cache: "auto" keeps decoded images if they are small and 1 GiB holds all, as its first readable image says;
            "ram" keeps small images decoded, of others the files, whatever memory that takes; "disk" does so in a
            file in the folder for temporary files, once for all ranks of a machine (and is collective); "none" keeps
            nothing; "device" keeps what "auto" does, for all but the training crops, which come from `resident`.

    Raises:
        UserError: "ram", and this machine's memory does not hold all images once for each of its ranks; "disk", and
            that folder does not hold them.
    """
    if cache == "none":
        return source
    shape = _first_shape(source)
    small = shape is not None and math.prod(shape) <= MAX_IMAGE_BYTES
    if cache in ("ram", "disk") and not small:
        return CachedFiles(source, cache == "disk")
    if shape is None or not small:
        return source
    wanted = math.prod(shape) * len(source)
    if cache == "ram":
        _check_memory(wanted)
    kept = cache in ("ram", "disk") or wanted <= MAX_BYTES
    return CachedSource(source, shape, cache == "disk") if kept else source


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


def _memory(size: int, on_disk: bool) -> mmap.mmap:
    """Zeros that forked processes share, and of a file on disk all ranks of this machine; then a collective call."""
    if not on_disk:
        return mmap.mmap(-1, size)
    hosts = dist.gather_objects(platform.node())
    first = hosts.index(hosts[dist.rank()])
    path = _attempt(lambda: _reserved(size) if first == dist.rank() else "", size)
    path = dist.gather_objects(path)[first]
    memory = _attempt(lambda: _mapped(Path(path), size), size)
    if first == dist.rank():
        Path(path).unlink()
    return memory


def _attempt(work: Callable[[], T], size: int) -> T:
    """What `work` returns, where it succeeds on all ranks; a collective call."""
    found, problem = [], None
    try:
        found.append(work())
    except OSError as error:
        problem = UserError(
            f"--cache disk: {tempfile.gettempdir()} cannot hold {size / 2**30:.1f} GiB ({error.strerror}); let TMPDIR "
            "name a folder on a larger disk of this machine, or leave --cache out"
        )
    dist.raise_together(problem)
    return found[0]


def _reserved(size: int) -> str:
    """Path of a new file whose room is taken at once: to write where there is none left would end the process."""
    number, path = tempfile.mkstemp(prefix="clusterssl-cache-")
    try:
        reserve = getattr(os, "posix_fallocate", lambda number, _, size: os.ftruncate(number, size))
        reserve(number, 0, size)
    except OSError:
        Path(path).unlink()
        raise
    finally:
        os.close(number)
    return path


def _mapped(path: Path, size: int) -> mmap.mmap:
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), size)


def _check_memory(wanted: int) -> None:
    usable = usable_bytes(HOST)
    if wanted > usable:
        raise UserError(
            f"--cache ram: a rank needs {wanted / 2**30:.1f} GiB, and each of {dist.local_size()} on this machine may "
            f"take {usable / 2**30:.1f} GiB of its free memory; leave --cache out, or pack smaller images "
            "(python -m clusterssl.data.pack SRC DST --short_side 256)"
        )
