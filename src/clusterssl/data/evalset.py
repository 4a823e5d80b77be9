"""Batches for evaluations: one image after the other, centre crop; or random crop and flip to train a classifier.

Suffixes: B rows of a batch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from clusterssl.data.augment import MEAN, STD, normalize
from clusterssl.data.badimages import BadImages
from clusterssl.data.boxes import empty_crops, resized_crop
from clusterssl.data.dataset import Key, load_or_neighbour
from clusterssl.data.loader import Guarded, checked, quiet_worker, same
from clusterssl.data.multicrop import MultiCrop
from clusterssl.data.params import Param
from clusterssl.data.source import Source
from clusterssl.errors import UserError
from clusterssl.rng import Stream, uniform

logger = logging.getLogger(__name__)


class EvalBatch(NamedTuple):
    """One batch of an evaluation."""

    images: Tensor
    """float32 [B, 3, h, w], normalised"""
    labels: Tensor
    """int64 [B]; -1 unlabelled"""
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    """int64 [B] dataset positions"""


def resize_for(image_size: tuple[int, int]) -> int:
    """Shorter side, in pixels, to which images are resized before the centre crop: 256 for 224, as published.

    Up to 64 pixels nothing is cropped away: such images are small and show one thing.
    """
    side = max(image_size)
    return side if side <= 64 else round(side * 256 / 224)


def eval_batches(
    source: Source,
    indices: ArrayLike | None = None,
    *,
    image_size: int | tuple[int, int],
    resize: int | None = None,
    batch_size: int = 256,
    workers: int = 0,
    train_augment: bool = False,
    scale: tuple[float, float] = (0.08, 1.0),
    seed: int = 0,
    epoch: int = 0,
    device: torch.device | str = "cpu",
    ledger: BadImages | None = None,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    square: int = 0,
) -> Iterator[EvalBatch]:
    """Iterates over images in the order given; the last batch may be smaller.

    Args:
        source: images.
        indices: dataset positions, in the order wanted; None: all in order.
        image_size: side of the square crop in pixels, or (height, width).
        resize: length of the shorter side before the centre crop; None: as the image is (smaller ones are enlarged).
        batch_size: B, images of a batch.
        workers: worker processes; 0: load in this process.
        train_augment: random resized crop and flip, a function of (seed, epoch, dataset position), instead of the
            centre crop.
        scale: area fractions of that random crop.
        seed, epoch: of those draws.
        device: where the images are normalised and delivered; they travel there as uint8.
        ledger: where unreadable images are entered; without one they are only logged.
        mean, std: of the channels, for the normalisation.
        square: with `train_augment`, instead of a random resized crop: resize the shorter side to this, cut the centre
            square, and a random window out of it (Caron et al. 2018, linear evaluation); 0: not.

    Yields:
        Batches of images, labels, positions. An unreadable image is replaced by its neighbour.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
    if square and square < max(size):
        raise UserError(f"square {square}: must be at least the crops' {max(size)} pixels")
    if min(size) < 1 or (resize is not None and resize < 1) or batch_size < 1:
        raise UserError(f"image_size {size}, resize {resize}, batch_size {batch_size}: all must be at least 1")
    order = np.arange(len(source)) if indices is None else np.asarray(indices, dtype=np.int64).reshape(-1)
    crop = MultiCrop((1,), (size,), scale[:1], scale[1:])
    dataset = _EvalDataset(source, size, resize, crop, train_augment, seed, square)
    labels = torch.from_numpy(np.asarray(source.labels))
    keys = [(epoch, i) for i in order.tolist()]
    device = torch.device(device)
    for images, index, bad in checked(_loader(dataset, keys, batch_size, workers, device.type == "cuda")):
        _enter(bad, source, ledger)
        yield EvalBatch(normalize(images.to(device, non_blocking=True), mean, std), labels[index], index)


def _loader(dataset: _EvalDataset, keys: list[Key], batch_size: int, workers: int, pin_memory: bool) -> DataLoader[Any]:
    return DataLoader(
        Guarded(dataset),
        batch_sampler=[keys[start : start + batch_size] for start in range(0, len(keys), batch_size)],
        collate_fn=same,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=quiet_worker,
        generator=torch.Generator(),
    )


def _enter(bad: Sequence[tuple[int, str]], source: Source, ledger: BadImages | None) -> None:
    if ledger is not None:
        ledger.add(bad)
        return
    for i, reason in bad:
        logger.warning("unreadable image replaced by its neighbour: %s: %s", source.name(i), reason)


class _EvalDataset(Dataset[Any]):
    """uint8 images of one size."""

    def __init__(
        self, source: Source, size: tuple[int, int], resize: int | None, crop: MultiCrop, augment: bool, seed: int,
        square: int,
    ) -> None:  # fmt: skip
        self.source = source
        self.size = size
        self.resize = resize
        self.crop = crop
        self.augment = augment
        self.seed = seed
        self.square = square

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, keys: Sequence[Key]) -> tuple[Tensor, Tensor, list[tuple[int, str]]]:
        out = empty_crops(len(keys), self.size)
        bad: list[tuple[int, str]] = []
        for row, (epoch, i) in enumerate(keys):
            image, met = load_or_neighbour(self.source, i)
            bad += met
            out[row] = self._random(image, epoch, i) if self.augment else centre_crop(image, self.size, self.resize)
        return out, torch.tensor([i for _, i in keys]), bad

    def _random(self, image: Tensor, epoch: int, i: int) -> Tensor:
        if self.square:
            return self._window(image, epoch, i)
        drawn = self.crop.draw(self.seed, epoch, i, image.shape[1], image.shape[2])
        crop = resized_crop(image, drawn.boxes_V4[0], self.size)
        return crop.flip(-1) if drawn.params_VP[0, Param.FLIP] else crop

    def _window(self, image: Tensor, epoch: int, i: int) -> Tensor:
        image = centre_crop(image, (self.square, self.square), self.square)
        down, right, flip = uniform(self.seed, Stream.CROPS, epoch, [i], 3)[0]
        top = int(down * (self.square - self.size[0] + 1))
        left = int(right * (self.square - self.size[1] + 1))
        window = image[:, top : top + self.size[0], left : left + self.size[1]]
        return window.flip(-1) if flip < 0.5 else window


def centre_crop(image: Tensor, size: tuple[int, int], resize: int | None) -> Tensor:
    """Resizes the shorter side (bilinear, antialiased) and cuts the centre out, as torchvision's Resize, CenterCrop.

    Args:
        image: uint8 [3, H, W].
        size: height, width of the result.
        resize: length of the shorter side in pixels; None: not resized. If a side is still too short for the crop, the
            image is enlarged until it fits (torchvision would pad with black).

    Returns:
        uint8 [3, h, w].
    """
    image = resized(image, size, resize)
    height, width = image.shape[1:]
    top, left = round((height - size[0]) / 2), round((width - size[1]) / 2)
    return image[:, top : top + size[0], left : left + size[1]]


def resized(image: Tensor, size: tuple[int, int], resize: int | None) -> Tensor:
    """The whole image uint8 [3, H, W] as `centre_crop` resizes it before it cuts."""
    height, width = image.shape[1:]
    if resize is not None:
        height, width = (
            (resize, int(resize * width / height)) if height <= width else (int(resize * height / width), resize)
        )
    enlarge = max(size[0] / height, size[1] / width, 1.0)
    if enlarge > 1:
        height, width = max(size[0], round(height * enlarge)), max(size[1], round(width * enlarge))
    if (height, width) == tuple(image.shape[1:]):
        return image
    planar = image[None].contiguous(memory_format=torch.channels_last)
    return F.interpolate(planar, size=(height, width), mode="bilinear", antialias=True)[0]
