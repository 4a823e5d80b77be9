"""Random boxes and their resize, against torchvision."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as TF

from clusterssl.data.boxes import BOX_SLOTS, TRIES, Interpolation, random_boxes, resized_crop
from clusterssl.data.decode import decode_file
from clusterssl.rng import Stream, uniform

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "multicrop.npz"


def reference_box(u: np.ndarray, height: int, width: int, scale: tuple[float, float]) -> tuple[int, int, int, int]:
    """torchvision's RandomResizedCrop.get_params, one draw at a time."""
    low, high = math.log(3 / 4), math.log(4 / 3)
    for t in range(TRIES):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * u[t])
        aspect = math.exp(low + (high - low) * u[TRIES + t])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return math.floor(u[-2] * (height - h + 1)), math.floor(u[-1] * (width - w + 1)), h, w
    w, h = width, height
    if width / height < 3 / 4:
        h = round(width / (3 / 4))
    elif width / height > 4 / 3:
        w = round(height * (4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("size", [(375, 500), (500, 333), (32, 32), (40, 400), (400, 31), (1, 1), (3, 2), (7, 1)])
def test_boxes_equal_the_sequential_algorithm(size: tuple[int, int]) -> None:
    scales = np.array([[0.14, 1.0], [0.05, 0.14], [1.0, 1.0]])
    u = uniform(1, Stream.CROPS, 0, np.arange(300), 3 * BOX_SLOTS).reshape(300, 3, BOX_SLOTS)
    boxes = random_boxes(u, *size, scales)
    for n in range(300):
        for v in range(3):
            expected = reference_box(u[n, v], *size, (scales[v, 0], scales[v, 1]))
            assert tuple(boxes[n, v]) == expected


def test_centre_fallback_is_torchvisions() -> None:
    u = np.random.default_rng(0).random((1, 1, BOX_SLOTS))
    for height, width in [(10, 1000), (1000, 10)]:
        expected = RandomResizedCrop.get_params(torch.zeros(3, height, width), [1.0, 1.0], [3 / 4, 4 / 3])
        assert tuple(random_boxes(u, height, width, np.array([[1.0, 1.0]]))[0, 0]) == expected


def test_each_image_of_a_batch_has_its_own_size() -> None:
    u = uniform(1, Stream.CROPS, 0, np.arange(4), 2 * BOX_SLOTS).reshape(4, 2, BOX_SLOTS)
    heights, widths = [30, 300, 31, 8], [40, 200, 500, 8]
    scales = np.array([[0.14, 1.0], [0.05, 0.14]])
    together = random_boxes(u, heights, widths, scales)
    for i in range(4):
        np.testing.assert_array_equal(random_boxes(u[i : i + 1], heights[i], widths[i], scales)[0], together[i])


def test_area_and_ratio_are_distributed_as_published() -> None:
    """The golden quantiles are of 4,000 boxes in a picture of 60 x 80; torchvision's own draws make it sharper."""
    golden = np.load(GOLDEN)
    n, height, width = 10_000, 60, 80
    u = uniform(7, Stream.CROPS, 0, np.arange(n), BOX_SLOTS).reshape(n, 1, BOX_SLOTS)
    ours = random_boxes(u, height, width, golden["box_scale"][None])[:, 0]
    torch.manual_seed(0)
    image = torch.zeros(3, height, width)
    scale = golden["box_scale"].tolist()
    published = np.array([RandomResizedCrop.get_params(image, scale, [3 / 4, 4 / 3]) for _ in range(n)])
    levels = [0.05, 0.25, 0.5, 0.75, 0.95]
    quantiles = np.quantile(area_and_ratio(ours, height, width), levels, axis=0)
    np.testing.assert_allclose(quantiles, golden["box_area_ratio_quantiles"], atol=0.025)
    expected = np.quantile(area_and_ratio(published, height, width), levels, axis=0)
    np.testing.assert_allclose(quantiles, expected, atol=0.02)
    np.testing.assert_allclose(ours.mean(axis=0), published.mean(axis=0), atol=0.6)


def area_and_ratio(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """[n, 2]."""
    return np.stack([boxes[:, 2] * boxes[:, 3] / (height * width), boxes[:, 3] / boxes[:, 2]], axis=1)


def test_resized_crop_equals_torchvision_on_photos(photos: list[Path]) -> None:
    rng = np.random.default_rng(0)
    for path in photos:
        image = decode_file(path)
        picture = Image.open(path).convert("RGB")
        _, height, width = image.shape
        for size in [(224, 224), (96, 96), (64, 128)]:
            h, w = rng.integers(height // 4, height + 1), rng.integers(width // 4, width + 1)
            top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
            ours = resized_crop(image, (top, left, h, w), size)
            tensor = TF.resized_crop(image, top, left, h, w, list(size), antialias=True)
            pil = TF.resized_crop(picture, top, left, h, w, list(size), InterpolationMode.BILINEAR)
            assert ours.shape == (3, *size) and ours.dtype == torch.uint8
            assert (ours.float() - tensor.float()).abs().mean() < 0.5
            assert (ours.float() - TF.pil_to_tensor(pil).float()).abs().mean() < 1


@pytest.mark.parametrize(("interpolation", "other"), [("bilinear", "bicubic"), ("bicubic", "bilinear")])
def test_crops_differ_from_pils_by_rounding(interpolation: Interpolation, other: Interpolation) -> None:
    """By at most 0.25 of 255 in the mean (0.04 on photographs) and hardly anywhere by more than 1.

    Both round to whole numbers after the first axis. That is the horizontal one in torch and whichever is cheaper in
    Pillow: where the order agrees, the mean is below 0.01.
    """
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
    picture = coarse.resize((400, 300), Image.Resampling.BICUBIC)
    image = TF.pil_to_tensor(picture)
    for size in [(224, 224), (96, 96), (64, 128)]:
        for _ in range(6):
            h, w = (int(x) for x in rng.integers(30, 300, 2))
            box = int(rng.integers(0, 300 - h)), int(rng.integers(0, 400 - w)), h, w
            pil = TF.pil_to_tensor(TF.resized_crop(picture, *box, list(size), InterpolationMode(interpolation)))
            difference = (resized_crop(image, box, size, interpolation).int() - pil.int()).abs()
            assert difference.float().mean() < 0.25 and (difference > 1).float().mean() < 2e-3
            assert (resized_crop(image, box, size, other).int() - pil.int()).abs().float().mean() > 0.3


def test_crop_of_equal_size_is_a_copy() -> None:
    image = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8)
    crop = resized_crop(image, (3, 4, 20, 30), (20, 30))
    assert torch.equal(crop, image[:, 3:23, 4:34])
    crop.zero_()
    assert image.any()
