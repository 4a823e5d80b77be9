"""Images that need no files: scikit-learn's handwritten digits and synthetic pictures for tests.

Suffixes: N images, H x W pixels.
"""

from __future__ import annotations

import re
from itertools import zip_longest

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from clusterssl.errors import UserError
from clusterssl.rng import Stream, uniform

DIGIT_SPLITS = {"train": (0, 1000), "val": (1000, 1300), "test": (1300, 1797)}
"""Rows of the fixed stratified order: training, tuning, and what is held back from all tuning."""


class MemorySource:
    """Images in memory."""

    def __init__(self, images_N3HW: Tensor, labels: NDArray[np.int64], classes: list[str], names: list[str]) -> None:
        self.images = images_N3HW
        self.labels = labels
        self.classes = classes
        self._names = names

    def __len__(self) -> int:
        return len(self.images)

    def name(self, i: int) -> str:
        """Name of image i."""
        return self._names[i]

    def load(self, i: int) -> Tensor:
        """Image i, uint8 [3, H, W]; a view, not to be written to."""
        return self.images[i]


def digits(split: str = "", limit: int = -1) -> MemorySource:
    """The 1,797 digits of scikit-learn (8 x 8, 16 grey levels), resized to 32 x 32 with three equal channels.

    Splits: train 1,000, val 300 (for tuning), test 497 (held back from all tuning); each holds every class in
    proportion. Empty: train.
    """
    from sklearn.datasets import load_digits

    split = split or "train"
    if split not in DIGIT_SPLITS:
        raise UserError(f"digits has no split {split!r}: choose from {', '.join(DIGIT_SPLITS)}")
    data = load_digits()
    labels = data.target.astype(np.int64)
    start, stop = DIGIT_SPLITS[split]
    if limit > 0:
        stop = min(stop, start + limit)
    rows = _stratified_order(labels)[start:stop]
    grey = torch.from_numpy(data.images[rows].astype(np.float32))[:, None] * (255.0 / 16.0)
    large = F.interpolate(grey, size=(32, 32), mode="bilinear", align_corners=False).round_().to(torch.uint8)
    names = [f"digits/{split}/{row}" for row in rows]
    return MemorySource(large.repeat(1, 3, 1, 1), labels[rows], [str(i) for i in range(10)], names)


def _stratified_order(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """A fixed random order in which every stretch holds the classes in proportion, [N]."""
    keys = uniform(0, Stream.SPLIT, 0, np.arange(len(labels)), 1)[:, 0]
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        place[members[np.argsort(keys[members])]] = (np.arange(len(members)) + 0.5) / len(members)
    return np.lexsort((keys, place))


def synthetic(data_path: str, split: str = "", limit: int = -1) -> MemorySource:
    """Coloured gratings, one direction and colour per class, with random phase, place and noise.

    Args:
        data_path: "synthetic[:N[:HxW[:classes]]]", by default 256 images of 32 x 32 in 4 classes.
        split: other splits are other draws of the same classes.
        limit: keep the first `limit` images; negative: all.
    """
    match = re.fullmatch(r"synthetic(?::(\d+)(?::(\d+)x(\d+)(?::(\d+))?)?)?", data_path)
    given = match.groups() if match else ("0",)
    n, height, width, classes = (int(x or d) for x, d in zip_longest(given, (256, 32, 32, 4), fillvalue=0))
    if min(n, height, width, classes) < 1:
        raise UserError(f"{data_path}: write synthetic:N:HxW:classes, for example synthetic:256:32x32:4")
    n = min(n, limit) if limit > 0 else n
    if n * height * width * 3 > 2**31:
        raise UserError(f"{data_path} needs {n * height * width * 3 / 2**30:.1f} GiB: at most 2 GiB are made")
    labels = np.arange(n, dtype=np.int64) % classes
    seed = int.from_bytes((split or "train").encode()[:8], "big")
    images = np.empty((n, 3, height, width), dtype=np.uint8)
    for i in range(n):
        u = uniform(seed, Stream.PIXELS, 0, [i], 3 + height * width)[0]
        images[i] = _grating(int(labels[i]), classes, u, (height, width))
    names = [f"synthetic/{split or 'train'}/{i}" for i in range(n)]
    return MemorySource(torch.from_numpy(images), labels, [f"class{c}" for c in range(classes)], names)


def _grating(label: int, classes: int, u: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.uint8]:
    """One picture, uint8 [3, H, W]."""
    y, x = np.mgrid[: size[0], : size[1]]
    angle = np.pi * (label + 0.3 * (u[0] - 0.5)) / classes
    wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * (0.5 + 0.1 * u[1]) + 2 * np.pi * u[2])
    colour = 0.5 + 0.5 * np.cos(2 * np.pi * (label / classes + np.arange(3) / 3))
    noise = u[3:].reshape(size) - 0.5
    return np.clip(128 + 90 * wave * (0.3 + 0.7 * colour[:, None, None]) + 30 * noise, 0, 255).astype(np.uint8)
