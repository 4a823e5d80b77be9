"""Whole datasets on the training device, as uint8: batches without workers, cut where they are needed.

Suffixes: N images, B rows of a batch, V views, P pixels of all images.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from clusterssl import dist, pulse
from clusterssl.data.dataset import Batch, Key, MultiCropDataset, load_or_neighbour
from clusterssl.data.decode import BadImageError
from clusterssl.data.devicecrops import Pixels, device_crops
from clusterssl.data.loader import Failure, checked, quiet_worker, same
from clusterssl.data.multicrop import MultiCrop
from clusterssl.data.source import Source
from clusterssl.errors import Stopped, UserError
from clusterssl.room import HOST, usable_bytes

logger = logging.getLogger(__name__)

_PIECE_BYTES, _PIECE_IMAGES = 2**24, 256  # whichever comes first; the last image may exceed the bytes
_IN_FLIGHT = 5
"""pieces a worker holds: two that wait, the one it decodes, and copies on their way"""
_REMEDY = "leave --cache out, or pack smaller images (python -m clusterssl.data.pack SRC DST --short_side 160)"


class Resident:
    """The images of a source, decoded, on one device."""

    def __init__(self, source: Source, pixels: Pixels, reasons: dict[int, str]) -> None:
        """Args: what was read; its images, empty where unreadable; why those are (position to reason)."""
        self.source, self.pixels, self._reasons = source, pixels, reasons
        self.classes, self.labels = source.classes, source.labels
        self.whole_batches = self.device.type != "cpu"
        """whether crops of a batch are cut at once; on CPUs that takes longer (bench/resident.py)"""
        self._met: dict[int, list[tuple[int, str]]] = {}
        self._row_N = np.arange(len(source))
        for i in reasons:
            _, self._met[i] = load_or_neighbour(self, i)
            self._row_N[i] = (i + len(self._met[i])) % len(source)

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self.pixels.flat_P3.device

    def __len__(self) -> int:
        return len(self.source)

    def name(self, i: int) -> str:
        """Name of image i."""
        return self.source.name(i)

    def load(self, i: int) -> Tensor:
        """Image i, uint8 [3, H, W] on the device; a view, not to be written to. Raises BadImageError."""
        if i in self._reasons:
            raise BadImageError(self._reasons[i])
        return self.pixels.image(i)

    def batch(self, multicrop: MultiCrop, seed: int, keys: Sequence[Key]) -> Batch:
        """What `MultiCropDataset` makes of these keys, to the bit, with its crops on the device."""
        if not self.whole_batches:
            return MultiCropDataset(self, multicrop, seed).__getitems__(keys)
        epoch, index_B = np.asarray(keys, dtype=np.int64).reshape(-1, 2).T
        row_B = self._row_N[index_B]
        u_BVS = multicrop.uniforms(seed, epoch, index_B)
        boxes_BV4 = multicrop.boxes(u_BVS, self.pixels.height_N[row_B], self.pixels.width_N[row_B])
        crops = device_crops(self.pixels, row_B, boxes_BV4, multicrop.sizes, multicrop.interpolation)
        bad = [entry for i in index_B.tolist() for entry in self._met.get(i, ())]
        return Batch.of(crops, multicrop.params(u_BVS), index_B, bad)


class _Piece(NamedTuple):
    """Some images one after the other; no tensors, as those of workers take /dev/shm, which may be small."""

    positions: list[int]
    flat_P3: NDArray[np.uint8]
    sizes: NDArray[np.int64]
    """[n, 2] heights and widths"""
    reasons: dict[int, str]

    @classmethod
    def of(cls, images: dict[int, Tensor], reasons: dict[int, str]) -> _Piece:
        """Images uint8 [3, H, W] by position."""
        flat_P3 = np.concatenate([image.permute(1, 2, 0).reshape(-1, 3).numpy() for image in images.values()])
        return cls(list(images), flat_P3, np.array([image.shape[1:] for image in images.values()]), reasons)


class _Decoded(IterableDataset[Any]):
    """Pieces of the images of one worker; `Failure` of its UserErrors."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        positions = range(len(self.source))
        try:
            yield from self._pieces(positions[worker.id :: worker.num_workers] if worker else positions)
        except UserError as error:
            yield Failure.of(error)

    def _pieces(self, positions: Sequence[int]) -> Iterator[_Piece]:
        images: dict[int, Tensor] = {}
        reasons: dict[int, str] = {}
        taken = 0
        for i in positions:
            try:
                images[i] = self.source.load(i)
            except BadImageError as error:
                reasons[i], images[i] = str(error), torch.empty(3, 0, 0, dtype=torch.uint8)
            taken += images[i].numel()
            if taken >= _PIECE_BYTES or len(images) >= _PIECE_IMAGES:
                yield _Piece.of(images, reasons)
                images, reasons, taken = {}, {}, 0
        if images:
            yield _Piece.of(images, reasons)


def reside(source: Source, device: torch.device, workers: int = 0) -> Resident:
    """Decodes all images of a source onto a device; every rank holds them all. A collective call.

    Args:
        source: images.
        device: of this rank.
        workers: processes that decode; 0: this one.

    Raises:
        UserError: they take more memory of the device, or on their way there of the host, than a rank may take; or
            none can be read.
        DataGone: they are out of reach.
        Stopped: a rank was asked to stop, see `pulse.poll`.
    """
    problem: UserError | Stopped | None = None
    found, began = None, time.monotonic()
    try:
        found = _read(source, device, workers)
    except (UserError, Stopped) as error:
        problem = error
    except (torch.OutOfMemoryError, MemoryError):
        problem = UserError(f"--cache device: the memory of {device} ran out while images were read; {_REMEDY}")
    dist.raise_together(problem)
    assert found is not None
    size, seconds = found.pixels.flat_P3.numel() / 2**20, time.monotonic() - began
    logger.info("--cache device: %d images, %.0f MiB, are on %s (read in %.0f s)", len(source), size, device, seconds)
    return found


def _read(source: Source, device: torch.device, workers: int) -> Resident:
    room = usable_bytes(device) / 2  # they are there twice when the pieces are joined
    height_N, width_N, start_N = np.zeros((3, len(source)), dtype=np.int64)
    parts: list[Tensor] = []
    reasons: dict[int, str] = {}
    taken = count = largest = 0
    for piece in _pieces(source, workers):
        height_N[piece.positions], width_N[piece.positions] = piece.sizes.T
        areas = piece.sizes.prod(axis=1)
        start_N[piece.positions] = taken // 3 + np.cumsum(areas) - areas
        taken, count, largest = taken + piece.flat_P3.size, count + len(areas), max(largest, piece.flat_P3.size)
        reasons |= piece.reasons
        pulse.poll(f"{count} of {len(source)} images read for --cache device")
        if taken > room:
            raise UserError(
                f"--cache device: {count} of {len(source)} images take {taken / 2**30:.2f} GiB, and "
                f"{room / 2**30:.2f} GiB of what is free on {device} may be used; {_REMEDY}"
            )
        _check_host(largest, workers)
        parts.append(torch.from_numpy(piece.flat_P3).to(device))
    flat_P3 = torch.cat(parts)
    parts.clear()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return Resident(source, Pixels(flat_P3, height_N, width_N, start_N), reasons)


def _pieces(source: Source, workers: int) -> Iterator[_Piece]:
    loader: DataLoader[Any] = DataLoader(
        _Decoded(source),
        batch_size=None,
        collate_fn=same,
        num_workers=workers,
        worker_init_fn=quiet_worker,
        generator=torch.Generator(),
    )
    return checked(loader)


def _check_host(largest: int, workers: int) -> None:
    """Refuses workers that may hold more on its way to the device than this rank may take of the host's memory."""
    wanted, usable = _IN_FLIGHT * workers * largest, usable_bytes(HOST)
    if wanted > usable:
        raise UserError(
            f"--cache device: {workers} --workers of each of {dist.local_size()} ranks on this machine hold "
            f"{wanted / 2**30:.2f} GiB a rank on its way to the device, of {usable / 2**30:.2f} GiB that it may take; "
            "lower --workers"
        )
