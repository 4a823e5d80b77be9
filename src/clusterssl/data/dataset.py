"""Images in, batches of crops out: what runs in the workers.

Suffixes: V views, B rows of a batch, P parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from clusterssl.data.boxes import buffer_bytes, crops_in, resized_crop
from clusterssl.data.decode import BadImageError
from clusterssl.data.multicrop import MultiCrop
from clusterssl.data.slots import Slots, Ticket
from clusterssl.data.smallcrops import is_small, small_crops
from clusterssl.data.source import Source
from clusterssl.errors import UserError

Key = tuple[int, int]
"""(epoch, dataset position): what a sampler asks for."""

MAX_NEIGHBOURS = 2000
_DECODED_BYTES = 2 * 2**20  # decoded images kept at a time: what a cache holds, and enough small ones


class Batch(NamedTuple):
    """Crops of B images, not yet augmented."""

    crops: list[Tensor]
    """V tensors uint8 [B, 3, h, w]"""
    params: Tensor
    """float32 [V, B, P], on the CPU; columns of `params.Param`"""
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    """int64 [B] dataset positions (also where a neighbour stands in for an unreadable image)"""
    bad: list[tuple[int, str]]
    """(dataset position, reason) of unreadable images met on the way"""

    @classmethod
    def of(
        cls,
        crops: list[Tensor],
        params_BVP: NDArray[np.float32],
        index_B: NDArray[np.int64],
        bad: list[tuple[int, str]],
    ) -> Batch:
        """From parameters by image, as they are drawn, and positions that may belong to somebody else."""
        params_VBP = torch.from_numpy(np.ascontiguousarray(params_BVP.swapaxes(0, 1)))
        return cls(crops, params_VBP, torch.from_numpy(index_B.copy()), bad)


class Shipped(NamedTuple):
    """A batch on its way out of a worker: all crops in one piece of shared memory."""

    buffer: Tensor | Ticket
    """arrives as a tensor"""
    rows: int
    sizes: list[tuple[int, int]]
    params: NDArray[np.float32]
    positions: NDArray[np.int64]
    bad: list[tuple[int, str]]

    @classmethod
    def of(cls, batch: Batch, slots: Slots) -> Shipped:
        """A batch of `MultiCropDataset`, whose crops lie behind one another, maybe in a slot."""
        buffer = torch.empty(0, dtype=torch.uint8).set_(batch.crops[0].untyped_storage())
        sizes = [(view.shape[2], view.shape[3]) for view in batch.crops]
        return cls(slots.ticket(buffer), len(batch.index), sizes, batch.params.numpy(), batch.index.numpy(), batch.bad)

    def batch(self) -> Batch:
        """What was shipped."""
        assert isinstance(self.buffer, Tensor)
        crops = crops_in(self.buffer, self.rows, self.sizes)
        return Batch(crops, torch.from_numpy(self.params), torch.from_numpy(self.positions), self.bad)


def shared_bytes(count: int) -> Tensor:
    """Uninitialised bytes; those of a worker are shared with the main process, so that they need not be copied."""
    if get_worker_info() is None:
        return torch.empty(count, dtype=torch.uint8)
    return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(count, device="cpu"))


def load_or_neighbour(source: Source, i: int) -> tuple[Tensor, list[tuple[int, str]]]:
    """Image i, or the next readable one after it, and the unreadable ones met.

    Raises:
        UserError: as many unreadable images in a row as are tried.
    """
    bad: list[tuple[int, str]] = []
    tries = min(len(source), MAX_NEIGHBOURS)
    for step in range(tries):
        at = (i + step) % len(source)
        try:
            return source.load(at), bad
        except BadImageError as error:
            bad.append((at, str(error)))
    raise UserError(f"{tries} unreadable images in a row from {source.name(i)} on ({bad[0][1]}); repair or remove them")


class MultiCropDataset(Dataset[Batch]):
    """Decodes each image once and takes all its crops; asked with keys (epoch, dataset position)."""

    def __init__(self, source: Source, multicrop: MultiCrop, seed: int, slots: Slots | None = None) -> None:
        self.source = source
        self.multicrop = multicrop
        self.seed = seed
        self._slots = slots

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> Batch:
        """A batch of one image."""
        return self.__getitems__([key])

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        """The batch of these images; every row depends on its own key only."""
        epoch, index = np.asarray(keys, dtype=np.int64).reshape(-1, 2).T
        u_BVS = self.multicrop.uniforms(self.seed, epoch, index)
        crops = crops_in(self._buffer(buffer_bytes(len(index), self.multicrop.sizes)), len(index), self.multicrop.sizes)
        bad: list[tuple[int, str]] = []
        images: list[Tensor] = []
        waiting = 0
        for row, i in enumerate(index.tolist()):
            image, met = load_or_neighbour(self.source, i)
            images.append(image)
            bad += met
            waiting += image.numel()
            if row + 1 == len(index) or waiting >= _DECODED_BYTES:
                rows = slice(row + 1 - len(images), row + 1)
                self._crop(images, u_BVS[rows], [out[rows] for out in crops])
                images, waiting = [], 0
        return Batch.of(crops, self.multicrop.params(u_BVS), index, bad)

    def _buffer(self, count: int) -> Tensor:
        slot = self._slots.take(count) if self._slots is not None else None
        return shared_bytes(count) if slot is None else slot

    def _crop(self, images: Sequence[Tensor], u_BVS: NDArray[np.float64], out: Sequence[Tensor]) -> None:
        """Writes the crops of some decoded images."""
        sizes, how = self.multicrop.sizes, self.multicrop.interpolation
        heights, widths = [x.shape[1] for x in images], [x.shape[2] for x in images]
        boxes_BV4 = self.multicrop.boxes(u_BVS, heights, widths)
        if len({image.shape for image in images}) == 1 and is_small(heights[0], widths[0], sizes):
            for view, crops in zip(out, small_crops(torch.stack(list(images)), boxes_BV4, sizes, how), strict=True):
                view.copy_(crops)
            return
        for row, (image, boxes_V4) in enumerate(zip(images, boxes_BV4, strict=True)):
            for view, box, size in zip(out, boxes_V4, sizes, strict=True):
                view[row] = resized_crop(image, box, size, how)


def collate(batches: Sequence[Batch]) -> Batch:
    """Joins batches row by row."""
    return Batch(
        [torch.cat(views) for views in zip(*(batch.crops for batch in batches), strict=True)],
        torch.cat([batch.params for batch in batches], dim=1),
        torch.cat([batch.index for batch in batches]),
        [entry for batch in batches for entry in batch.bad],
    )
