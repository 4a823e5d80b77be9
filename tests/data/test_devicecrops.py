"""Crops of whole batches on one device: the bits of torch's own resize, box by box."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from clusterssl.data import devicecrops
from clusterssl.data.boxes import Interpolation, resized_crop
from clusterssl.data.devicecrops import Pixels, device_crops

CPU = torch.device("cpu")
SIZES = ((24, 24), (24, 24), (16, 40), (96, 7))


def images_of(shapes: list[tuple[int, int]]) -> list[Tensor]:
    """Noise, and pictures of black and white only, planar and channels-last."""
    generator = torch.Generator().manual_seed(1)
    images = [torch.randint(0, 256, (3, *shape), dtype=torch.uint8, generator=generator) for shape in shapes]
    images[1] = (images[1] > 128) * torch.tensor(255, dtype=torch.uint8)
    images[2] = images[2].permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return images


def boxes_in(images: list[Tensor], views: int) -> np.ndarray:
    """Boxes of any sizes, among them whole images and single pixels."""
    rng = np.random.default_rng(2)
    boxes = np.empty((len(images), views, 4), dtype=np.int64)
    for row, image in enumerate(images):
        height, width = image.shape[1:]
        for view in range(views):
            h, w = rng.integers(1, height + 1), rng.integers(1, width + 1)
            boxes[row, view] = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w
        boxes[row, row % views] = [0, 0, height, width] if row % 3 else [height - 1, width - 1, 1, 1]
    return boxes


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shapes", [[(32, 32)] * 40, [(24, 24), (300, 17), (11, 500), (1, 1), (97, 130), (64, 40)]])
def test_bits_equal_torchs_resize(
    shapes: list[tuple[int, int]], interpolation: Interpolation, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = images_of(shapes)
    boxes_BV4 = boxes_in(images, len(SIZES))
    rows = np.random.default_rng(3).permutation(len(images))
    pixels = Pixels.of(images)
    whole = device_crops(pixels, rows, boxes_BV4[rows], SIZES, interpolation)
    monkeypatch.setitem(devicecrops._CHUNK_ELEMENTS, "cpu", 20_000)
    pieces = device_crops(pixels, rows, boxes_BV4[rows], SIZES, interpolation)
    for view, size in enumerate(SIZES):
        expected = torch.stack([resized_crop(images[i], boxes_BV4[i, view], size, interpolation) for i in rows])
        assert whole[view].dtype == torch.uint8
        assert torch.equal(whole[view], expected)
        assert torch.equal(pieces[view], expected)


def test_one_large_box_does_not_split_the_others() -> None:
    shapes = [(40, 50)] * 60 + [(1500, 1400)] + [(50, 40)] * 60
    images = images_of(shapes)
    rows, sizes = np.arange(len(images)), [(12, 10)] * 2
    boxes_BV4 = np.array([[[0, 0, *shape]] * 2 for shape in shapes])
    boxes_C4 = np.concatenate([boxes_BV4[:, view] for view in range(2)])
    chunks = devicecrops._chunks(CPU, boxes_C4, sizes[0])
    assert len(chunks) <= 4 and sorted(np.concatenate(chunks).tolist()) == list(range(len(boxes_C4)))
    limit = devicecrops._CHUNK_ELEMENTS["cpu"]
    for chunk in chunks:
        high, wide = boxes_C4[chunk, 2:].max(axis=0)
        assert len(chunk) == 1 or 3 * high * (wide + 2 * 10) * len(chunk) <= limit
    crops = device_crops(Pixels.of(images), rows, boxes_BV4, sizes)
    for view in range(2):
        expected = torch.stack(
            [resized_crop(image, box, (12, 10)) for image, box in zip(images, boxes_BV4[:, view], strict=True)]
        )
        assert torch.equal(crops[view], expected)


def test_few_boxes_keep_their_order() -> None:
    boxes_C4 = np.array([[0, 0, 3 + i % 7, 9] for i in range(20)])
    (chunk,) = devicecrops._chunks(CPU, boxes_C4, (8, 8))
    assert chunk.tolist() == list(range(20))


class Products(TorchDispatchMode):
    """Records the factors and results of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.factors: list[Tensor] = []
        self.sums: list[Tensor] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.bmm.default:
            self.factors += args
            self.sums.append(result)
        return result


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_products_are_exact_in_every_mode_of_a_gpu(interpolation: Interpolation) -> None:
    images = images_of([(300, 280)] * 6)
    with Products() as seen:
        device_crops(Pixels.of(images), np.arange(6), boxes_in(images, 1), [(20, 30)], interpolation)
    assert len(seen.factors) == 4
    assert all(torch.equal(x, x.bfloat16().float()) for x in seen.factors)
    assert all(x.abs().max() < 2**24 for x in seen.sums)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_bits() -> None:
    images = images_of([(24, 24), (300, 17), (11, 500), (1, 1), (97, 130), (64, 40)])
    boxes_BV4, rows = boxes_in(images, len(SIZES)), np.arange(6)
    here = device_crops(Pixels.of(images), rows, boxes_BV4, SIZES)
    there = device_crops(Pixels.of([image.cuda() for image in images]), rows, boxes_BV4, SIZES)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there, strict=True))
