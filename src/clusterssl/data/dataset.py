"""Images in, batches of crops out: what runs in the workers.

Suffixes: V views, B rows of a batch, P parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from clusterssl.data.boxes import empty_crops, resized_crop
from clusterssl.data.decode import BadImageError
from clusterssl.data.multicrop import MultiCrop
from clusterssl.data.source import Source
from clusterssl.errors import UserError

Key = tuple[int, int]
"""(epoch, dataset position): what a sampler asks for."""

MAX_NEIGHBOURS = 64
_CHUNK = 16


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
    raise UserError(f"{tries} unreadable images in a row from {source.name(i)} on ({bad[0][1]}): check data_path")


class MultiCropDataset(Dataset[Batch]):
    """Decodes each image once and takes all its crops; asked with keys (epoch, dataset position)."""

    def __init__(self, source: Source, multicrop: MultiCrop, seed: int) -> None:
        self.source = source
        self.multicrop = multicrop
        self.seed = seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> Batch:
        """A batch of one image."""
        return self.__getitems__([key])

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        """The batch of these images; every row depends on its own key only."""
        epoch, index = np.asarray(keys, dtype=np.int64).reshape(-1, 2).T
        u_BVS = self.multicrop.uniforms(self.seed, epoch, index)
        crops = [empty_crops(len(index), size) for size in self.multicrop.sizes]
        bad: list[tuple[int, str]] = []
        for rows in _chunks(len(index)):
            images = []
            for i in index[rows]:
                image, met = load_or_neighbour(self.source, int(i))
                images.append(image)
                bad += met
            heights, widths = [x.shape[1] for x in images], [x.shape[2] for x in images]
            boxes = self.multicrop.boxes(u_BVS[rows], heights, widths)
            for row, image, boxes_V4 in zip(range(rows.start, rows.stop), images, boxes, strict=True):
                for out, box, size in zip(crops, boxes_V4, self.multicrop.sizes, strict=True):
                    out[row] = resized_crop(image, box, size)
        params_VBP = torch.from_numpy(np.ascontiguousarray(self.multicrop.params(u_BVS).swapaxes(0, 1)))
        return Batch(crops, params_VBP, torch.from_numpy(index.copy()), bad)


def _chunks(n: int) -> Iterator[slice]:
    for start in range(0, n, _CHUNK):
        yield slice(start, min(start + _CHUNK, n))


def collate(batches: Sequence[Batch]) -> Batch:
    """Joins batches row by row."""
    return Batch(
        [torch.cat(views) for views in zip(*(batch.crops for batch in batches), strict=True)],
        torch.cat([batch.params for batch in batches], dim=1),
        torch.cat([batch.index for batch in batches]),
        [entry for batch in batches for entry in batch.bad],
    )
