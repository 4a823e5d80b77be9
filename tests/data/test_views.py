"""Views of whole images against torchvision's transforms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T

from clusterssl.data import MEAN, STD, open_source
from clusterssl.data.views import CentreCrop, RandomSquare, TenCrops, view_batches
from clusterssl.errors import UserError


@pytest.mark.parametrize("workers", [0, 2])
def test_ten_crops_equal_torchvisions(tree: Path, workers: int) -> None:
    source = open_source(str(tree))
    keys = [[(0, 5), (0, 0)], [(0, 11)]]
    found = list(view_batches(source, keys, TenCrops((28, 24), 36), workers=workers))
    assert [index.tolist() for _, index in found] == [[5, 0], [11]]
    cut = T.Compose(
        [T.Resize(36), T.TenCrop((28, 24)), T.Lambda(lambda crops: torch.stack([T.ToTensor()(c) for c in crops]))]
    )
    for views, index in found:
        for row, i in zip(views, index.tolist(), strict=True):
            expected = T.Normalize(MEAN, STD)(cut(Image.open(source.name(i)).convert("RGB")))
            assert row.shape == expected.shape == (10, 3, 28, 24)
            assert (row - expected).abs().mean() < 1 / 255 / 0.22 / 2


def test_centre_crop_and_own_normalisation(tree: Path) -> None:
    source = open_source(str(tree))
    ((views, _),) = view_batches(source, [[(0, 3)]], CentreCrop((20, 20), 24), std=(0.5, 0.5, 0.5), mean=(0, 0, 0))
    expected = T.Compose([T.Resize(24), T.CenterCrop(20), T.ToTensor()])(Image.open(source.name(3)).convert("RGB"))
    assert views.shape == (1, 1, 3, 20, 20)
    assert (views[0, 0] - 2 * expected).abs().mean() < 2 / 255


def test_random_squares_are_squares_of_the_wanted_area() -> None:
    """On an image whose pixels tell their place, the first and last row and column of a view tell its box."""
    high, wide = 60, 100
    image = torch.zeros(3, high, wide, dtype=torch.uint8)
    image[0] = torch.arange(high, dtype=torch.uint8)[:, None] * 4
    image[1] = torch.arange(wide, dtype=torch.uint8) * 2
    cut, areas, flips = RandomSquare((32, 32), (0.1, 0.5), seed=5), [], 0
    for epoch in range(300):
        view = cut(image, epoch, 7)[0].float()
        side = (view[0, -1] - view[0, 0]).mean() / 4 * 32 / 31
        across = (view[1, :, -1] - view[1, :, 0]).mean() / 2 * 32 / 31
        assert abs(float(side) - abs(float(across))) < 1.5
        flips += bool(across < 0)
        areas.append(float(side) ** 2 / (high * wide))
    assert 0.08 < min(areas) < 0.14 and 0.44 < max(areas) < 0.53
    assert 0.2 < np.mean(areas) < 0.4 and 110 < flips < 190


def test_random_squares_are_a_function_of_seed_epoch_and_position(tree: Path) -> None:
    source = open_source(str(tree))

    def views(seed: int, keys: list[tuple[int, int]], workers: int = 0) -> list[torch.Tensor]:
        cut = RandomSquare((16, 16), (0.1, 0.5), seed)
        return [x for batch, _ in view_batches(source, [keys], cut, workers=workers) for x in batch]

    one, two = views(1, [(0, 4), (1, 4)])
    assert torch.equal(views(1, [(1, 4)], workers=1)[0], two)
    assert not torch.equal(one, two) and not torch.equal(views(2, [(0, 4)])[0], one)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named(tree: Path, workers: int) -> None:
    source = open_source(str(tree))
    Path(source.name(2)).write_bytes(b"")
    with pytest.raises(UserError, match="empty file; repair it"):
        list(view_batches(source, [[(0, 1), (0, 2)]], TenCrops((8, 8), 9), workers=workers))
