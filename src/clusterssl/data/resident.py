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
from torch.utils.data import DataLoader, Dataset

from clusterssl import dist, pulse
from clusterssl.data.cache import available_bytes
from clusterssl.data.dataset import Batch, Key, MultiCropDataset, load_or_neighbour
from clusterssl.data.decode import BadImageError
from clusterssl.data.devicecrops import Pixels, device_crops
from clusterssl.data.loader import Guarded, checked, quiet_worker, same
from clusterssl.data.multicrop import MultiCrop
from clusterssl.data.source import Source
from clusterssl.errors import UserError

logger = logging.getLogger(__name__)

USABLE = 0.4
"""share of the device's free memory that the images may take"""
_AT_ONCE = 64


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
        params_VBP = torch.from_numpy(np.ascontiguousarray(multicrop.params(u_BVS).swapaxes(0, 1)))
        bad = [entry for i in index_B.tolist() for entry in self._met.get(i, ())]
        return Batch(crops, params_VBP, torch.from_numpy(index_B.copy()), bad)


class _Piece(NamedTuple):
    """Some images one after the other."""

    flat_P3: Tensor
    sizes: NDArray[np.int64]
    """[n, 2] heights and widths"""
    reasons: dict[int, str]


class _Decoded(Dataset[Any]):
    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, positions: Sequence[int]) -> _Piece:
        images, reasons = [], {}
        for i in positions:
            try:
                images.append(self.source.load(i))
            except BadImageError as error:
                reasons[i] = str(error)
                images.append(torch.empty(3, 0, 0, dtype=torch.uint8))
        pixels = Pixels.of(images)
        return _Piece(pixels.flat_P3, np.stack([pixels.height_N, pixels.width_N], axis=-1), reasons)


def reside(source: Source, device: torch.device, workers: int = 0) -> Resident:
    """Decodes all images of a source onto a device; every rank holds them all. A collective call.

    Args:
        source: images.
        device: of this rank.
        workers: processes that decode; 0: this one.

    Raises:
        UserError: they take more than `USABLE` of the device's free memory, on any rank; or none can be read.
        DataGone: they are out of reach.
    """
    problem, found, began = None, None, time.monotonic()
    try:
        found = _read(source, device, workers)
    except UserError as error:
        problem = error
    dist.raise_together(problem)
    assert found is not None
    size, seconds = found.pixels.flat_P3.numel() / 2**20, time.monotonic() - began
    logger.info("--cache device: %d images, %.0f MiB, are on %s (read in %.0f s)", len(source), size, device, seconds)
    return found


def _read(source: Source, device: torch.device, workers: int) -> Resident:
    room = USABLE * _free_bytes(device)
    pieces: list[_Piece] = []
    taken = count = 0
    for piece in _pieces(source, workers):
        pieces.append(piece)
        taken, count = taken + piece.flat_P3.numel(), count + len(piece.sizes)
        pulse.beat(f"{count} of {len(source)} images read for --cache device")
        if taken > room:
            raise UserError(
                f"--cache device: the first {count} of {len(source)} images take {taken / 2**30:.2f} GiB, and "
                f"{room / 2**30:.2f} GiB ({USABLE:.0%} of what is free on {device}) may be used; leave --cache away, "
                "or pack smaller images (python -m clusterssl.data.pack SRC DST --short_side 160)"
            )
    height_N, width_N = np.concatenate([piece.sizes for piece in pieces]).T.copy()
    reasons = {i: reason for piece in pieces for i, reason in piece.reasons.items()}
    flat_P3 = torch.empty(taken // 3, 3, dtype=torch.uint8, device=device)
    at = 0
    for piece in pieces:
        flat_P3[at : at + len(piece.flat_P3)] = piece.flat_P3
        at += len(piece.flat_P3)
    return Resident(source, Pixels.laid(flat_P3, height_N, width_N), reasons)


def _pieces(source: Source, workers: int) -> Iterator[_Piece]:
    positions = range(len(source))
    loader: DataLoader[Any] = DataLoader(
        Guarded(_Decoded(source)),
        batch_sampler=[list(positions[at : at + _AT_ONCE]) for at in positions[::_AT_ONCE]],
        collate_fn=same,
        num_workers=workers,
        worker_init_fn=quiet_worker,
        generator=torch.Generator(),
    )
    for piece in checked(loader):
        yield piece._replace(flat_P3=piece.flat_P3.clone())  # shared memory is scarce


def _free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return available_bytes() / dist.local_size()
