"""Features of a frozen network for whole datasets, shared out over the ranks.

Legend of suffixes: N images, F features, B images of a batch.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from clusterssl import dist
from clusterssl.data import STD, BadImages, EvalBatch, Source, eval_batches, resize_for
from clusterssl.data.views import TenCrops, view_batches
from clusterssl.evals.classifier import Step, rows_of_steps

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10.0
_ROWS_PER_EXCHANGE = 65536


@torch.no_grad()
def extract(
    backbone: nn.Module,
    source: Source,
    *,
    image_size: tuple[int, int],
    resize: int | None = None,
    batch_size: int = 256,
    workers: int = 0,
    device: torch.device | str = "cpu",
    indices: NDArray[np.int64] | None = None,
    gather: bool = True,
    what: str = "features",
    ledger: Unreadable | None = None,
    std: Sequence[float] = STD,
    ten_crops: bool = False,
) -> tuple[Tensor, Tensor]:
    """Features of centre crops in float32, in dataset order, each readable image once; in evaluation mode.

    A collective: whole batches are shared out over the ranks, so that every batch is the same on any number of them.

    Args:
        backbone: from images B x 3 x h x w to features B x F or B x F x h x w.
        source: images.
        image_size: height and width of the centre crop.
        resize: shorter side before it; by `resize_for` when None.
        batch_size: images at a time.
        workers: loader processes of this rank.
        device: where to compute; the backbone is moved there.
        indices: dataset positions; all when None.
        gather: give every rank all rows, else only those of its own share.
        what: name of the images in log lines.
        ledger: where this rank's unreadable images are entered.
        std: of the channels, for the normalisation.
        ten_crops: four corners and the centre and their mirror images instead of the centre: features [N, 10, ...].

    Returns:
        Features [N, ...] float32 and labels [N] int64, on the CPU.
    """
    rows = np.arange(len(source)) if indices is None else np.asarray(indices)
    first, last = dist.share(-(-len(rows) // batch_size))
    mine = rows[first * batch_size : last * batch_size]
    unreadable = Unreadable(source) if ledger is None else ledger
    batches = feature_batches(
        backbone, source, mine, image_size=image_size, resize=resize, batch_size=batch_size, workers=workers,
        device=device, ledger=unreadable, std=std, what=what, ten_crops=ten_crops,
    )  # fmt: skip
    parts = list(batches)
    readable = torch.from_numpy(unreadable.readable(mine))
    features = _with_shape(parts)[readable]
    labels = torch.from_numpy(np.asarray(source.labels)[mine])[readable]
    tell_left_out(readable, what)
    return (_gather(features), dist.all_gather_cat(labels)) if gather else (features, labels)


@torch.no_grad()
def feature_batches(
    backbone: nn.Module, source: Source, rows: NDArray[np.int64], *, image_size: tuple[int, int], resize: int | None,
    batch_size: int, workers: int, device: torch.device | str, ledger: BadImages, std: Sequence[float], what: str,
    ten_crops: bool = False,
) -> Iterator[Tensor]:  # fmt: skip
    """Features of centre crops (or ten crops) batch by batch, float32 on the CPU; arguments as in `extract`.

    Every position of `rows` gives a row; those entered in `ledger` belong to a neighbour of an unreadable image.
    """
    was_training, device = backbone.training, torch.device(device)
    backbone.to(device).eval()
    resize = resize_for(image_size) if resize is None else resize
    loading: Any = {"workers": workers, "device": device, "std": std}
    if ten_crops:
        keys = [[(0, i) for i in part.tolist()] for part in _parts(rows, max(batch_size // 10, 1))]
        views = view_batches(source, keys, TenCrops(image_size, resize), **loading)
        batches: Iterable[EvalBatch] = (EvalBatch(images, index, index) for images, index in views)
    else:
        batches = eval_batches(
            source, rows, image_size=image_size, resize=resize, batch_size=batch_size, ledger=ledger, **loading
        )
    try:
        for batch in timed(batches, len(rows), what):
            if ten_crops:
                yield backbone(batch.images.flatten(0, 1)).float().cpu().unflatten(0, batch.images.shape[:2])
            else:
                yield backbone(batch.images).float().cpu()
    finally:
        backbone.train(was_training)


def _parts(rows: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def tell_left_out(readable: Tensor, what: str) -> None:
    """Say once how many images of all ranks could not be read."""
    left_out = int(dist.all_reduce_((~readable).sum()))
    if left_out and dist.rank() == 0:
        logger.warning("%s: %d unreadable images left out", what, left_out)


class Unreadable(BadImages):
    """Notes which positions could not be read; an evaluation leaves them out rather than count a neighbour twice."""

    def __init__(self, source: Source) -> None:
        super().__init__(source, max_bad_fraction=1.0)
        self.positions: set[int] = set()

    def add(self, bad: Iterable[tuple[int, str]]) -> None:
        for position, reason in bad:
            if position not in self.positions:
                self.positions.add(position)
                logger.warning("unreadable image: %s: %s", self.source.name(position), reason)

    def readable(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which dataset positions could be read."""
        return ~np.isin(rows, list(self.positions))


def _with_shape(parts: list[Tensor]) -> Tensor:
    """All rows of this rank; a rank without any learns the shape of a row from the others."""
    shapes = [dist.broadcast_object(list(parts[0].shape[1:]) if parts else [], src) for src in range(dist.size())]
    return torch.cat(parts) if parts else torch.empty(0, *max(shapes, key=len))


def _gather(mine: Tensor) -> Tensor:
    """Rows of all ranks in order, exchanged in pieces so that little more than the result is ever in memory."""
    if dist.size() == 1:
        return mine
    lengths = dist.all_gather_cat(torch.tensor([len(mine)])).tolist()
    starts = [0, *itertools.accumulate(lengths)]
    result = mine.new_empty(starts[-1], *mine.shape[1:])
    for offset in range(0, max(lengths), _ROWS_PER_EXCHANGE):
        piece = dist.all_gather_cat(mine[offset : offset + _ROWS_PER_EXCHANGE])
        for start, length in zip(starts, lengths, strict=False):
            number = min(max(length - offset, 0), _ROWS_PER_EXCHANGE)
            result[start + offset : start + offset + number] = piece[:number]
            piece = piece[number:]
    return result


def timed(batches: Iterable[EvalBatch], images: int, what: str) -> Iterator[EvalBatch]:
    """Pass batches on; every ten seconds and at the end a line says how far and how fast."""
    start = shown = time.monotonic()
    done = 0
    for batch in batches:
        yield batch
        done += len(batch.images)
        now = time.monotonic()
        if now - shown > _SECONDS_BETWEEN_LINES or done >= images:
            shown, speed = now, done / max(now - start, 1e-9)
            share = f" a rank (rank 0 of {dist.size()})" if dist.size() > 1 else ""
            logger.info("%s: %d of %d images, %.0f images/s%s", what, done, images, speed, share)


@torch.no_grad()
def augmented_steps(
    backbone: nn.Module,
    source: Source,
    indices: NDArray[np.int64],
    order_N: Tensor,
    *,
    image_size: tuple[int, int],
    batch_size: int,
    workers: int,
    device: torch.device,
    seed: int,
    epoch: int,
    std: Sequence[float] = STD,
    square: int = 0,
) -> Iterator[Step]:
    """Training steps of one epoch through the frozen network: random crop and flip, drawn anew each epoch.

    Args:
        backbone: from images to features, in evaluation mode already.
        source: images.
        indices: dataset positions of the N training images.
        order_N: order of the epoch, positions in `indices`.
        image_size: height and width of the crops.
        batch_size: images of this rank per step.
        workers: loader processes of this rank.
        device: where the backbone is.
        seed, epoch: of the crops.
        std: of the channels, for the normalisation.
        square: see `eval_batches`; 0 for random resized crops.
    """
    steps = list(rows_of_steps(order_N, batch_size))
    mine = indices[torch.cat([rows for rows, _ in steps]).numpy()]
    batches = eval_batches(
        source, mine, image_size=image_size, resize=None, batch_size=batch_size, workers=workers, train_augment=True,
        seed=seed, epoch=epoch, device=device, std=std, square=square,
    )  # fmt: skip
    stream = timed(batches, len(mine), f"epoch {epoch + 1}, training")
    for rows, total in steps:
        if len(rows):
            batch = next(stream)
            yield Step(backbone(batch.images).float(), batch.labels, total)
        else:  # fewer images than ranks are left; layers that exchange statistics wait for this rank, too
            nothing = torch.zeros(0, 3, *image_size, device=device)
            yield Step(backbone(nothing).float(), torch.empty(0, dtype=torch.int64), total)
    for _ in stream:  # lets the last line of progress out
        pass


@torch.no_grad()
def calibrate_batchnorm(backbone: nn.Module, images: Iterable[Tensor]) -> None:
    """Set the running statistics of all BatchNorm layers to their averages over the data, weights untouched.

    An untrained network becomes a fair baseline that way: with the statistics it is born with, 0 and 1, it looks
    worse than it is.

    Args:
        backbone: network; its mode is as before afterwards.
        images: batches B x 3 x H x W of equal size, on the backbone's device.
    """
    norms = [layer for layer in backbone.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    modes = [(module, module.training) for module in backbone.modules()]
    momenta = [norm.momentum for norm in norms]
    backbone.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
        norm.train()
    for batch in images:
        backbone(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    for module, mode in modes:
        module.training = mode
