"""Batched crops of small images: the same bits as one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clusterssl.data.boxes import Interpolation, resized_crop
from clusterssl.data.smallcrops import is_small, small_crops


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("height", "width", "sizes"),
    [
        (32, 32, ((32, 32), (24, 16), (20, 48))),
        (64, 64, ((64, 64), (32, 32))),
        (48, 31, ((40, 64), (24, 16))),
        (8, 8, ((32, 32), (4, 4))),
        (1, 1, ((2, 3),)),
    ],
)
def test_bits_equal_torchs_resize(
    height: int, width: int, sizes: tuple[tuple[int, int], ...], interpolation: Interpolation
) -> None:
    rng = np.random.default_rng(0)
    n = 150
    images = torch.from_numpy(rng.integers(0, 256, (n, 3, height, width), dtype=np.uint8))
    images[:20] = 255
    images[20:50] = (images[20:50] > 128) * 255
    h, w = rng.integers(1, height + 1, (n, len(sizes))), rng.integers(1, width + 1, (n, len(sizes)))
    h[::7], w[::5] = height, width
    top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
    boxes = np.stack([top, left, h, w], axis=-1)
    assert is_small(height, width, sizes)
    for view, (crops, size) in enumerate(zip(small_crops(images, boxes, sizes, interpolation), sizes, strict=True)):
        expected = torch.stack([resized_crop(images[i], boxes[i, view], size, interpolation) for i in range(n)])
        assert crops.dtype == torch.uint8
        assert torch.equal(crops, expected)


def test_what_is_small() -> None:
    assert is_small(32, 32, ((32, 32), (16, 16)))
    assert not is_small(32, 32, ((32, 32), (15, 16)))
    assert not is_small(65, 32, ((64, 64),))
    assert not is_small(32, 32, ((96, 96),))
