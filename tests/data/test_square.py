"""Random windows of a resized square, as DeepCluster trains its linear classifiers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from clusterssl.data import MEAN, STD, eval_batches, open_source
from clusterssl.errors import UserError


def windows(epoch: int, square: int = 20, size: int = 16) -> torch.Tensor:
    source = open_source("synthetic:200:24x30")
    (batch,) = eval_batches(
        source, image_size=size, batch_size=200, train_augment=True, square=square, seed=3, epoch=epoch
    )  # fmt: skip
    return batch.images


def test_every_window_is_one_of_the_square_and_all_occur() -> None:
    source, found = open_source("synthetic:200:24x30"), windows(0)
    cut = v2.Compose([
        v2.ToImage(), v2.Resize(20), v2.CenterCrop(20), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD),
    ])  # fmt: skip
    places = set()
    for i, window in enumerate(found):
        square = cut(Image.fromarray(source.load(i).permute(1, 2, 0).numpy()))
        distances = {
            (top, left, flip): float((part.flip(-1) if flip else part).sub(window).abs().mean())
            for top in range(5) for left in range(5) for flip in (0, 1)
            for part in [square[:, top : top + 16, left : left + 16]]
        }  # fmt: skip
        place = min(distances, key=lambda place: distances[place])
        assert distances[place] < 0.02
        places.add(place)
    assert len(places) > 40  # of 50
    assert np.mean([flip for _, _, flip in places]) == pytest.approx(0.5, abs=0.1)


def test_windows_change_with_the_epoch_alone() -> None:
    assert torch.equal(windows(1), windows(1))
    assert ((windows(0) - windows(1)).abs().amax((1, 2, 3)) > 1e-3).sum() > 180


def test_a_square_smaller_than_the_crop() -> None:
    with pytest.raises(UserError, match="square 12: must be at least the crops' 16 pixels"):
        windows(0, square=12)
