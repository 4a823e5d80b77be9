"""Batches for evaluations, against torchvision's transforms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T
from torchvision.transforms import functional as TF

from clusterssl.data import MEAN, STD, BadImages, EvalBatch, MultiCrop, eval_batches, open_source, resize_for
from clusterssl.data.params import Param
from clusterssl.errors import UserError


def joined(batches: list[EvalBatch]) -> torch.Tensor:
    """All images."""
    return torch.cat([batch.images for batch in batches])


@pytest.mark.parametrize("workers", [0, 2])
def test_centre_crops_equal_torchvisions(tree: Path, workers: int) -> None:
    source = open_source(str(tree))
    batches = list(eval_batches(source, image_size=28, resize=36, batch_size=5, workers=workers))
    assert [len(batch.images) for batch in batches] == [5, 5, 2]
    assert torch.cat([batch.index for batch in batches]).tolist() == list(range(12))
    np.testing.assert_array_equal(torch.cat([batch.labels for batch in batches]), source.labels)
    transform = T.Compose([T.Resize(36), T.CenterCrop(28), T.ToTensor(), T.Normalize(MEAN, STD)])
    expected = torch.stack([transform(Image.open(source.name(i))) for i in range(12)])
    images = joined(batches)
    assert images.dtype == torch.float32
    assert (images - expected).abs().mean() < 1 / 255 / 0.22 / 2


def test_photos_equal_torchvisions(photos: list[Path]) -> None:
    source = open_source(str(photos[0].parent))
    transform = T.Compose([T.Resize(256), T.CenterCrop(224), T.ToTensor(), T.Normalize(MEAN, STD)])
    for batch in eval_batches(source, range(4), image_size=224, resize=256, batch_size=1):
        expected = transform(Image.open(source.name(int(batch.index))).convert("RGB"))
        assert (batch.images[0] - expected).abs().mean() < 1 / 255 / 0.22


def test_order_given_and_no_resize() -> None:
    source = open_source("digits", split="val")
    (batch,) = eval_batches(source, [7, 3, 7], image_size=32)
    assert batch.index.tolist() == [7, 3, 7]
    expected = TF.normalize(source.load(7).float() / 255, list(MEAN), list(STD))
    torch.testing.assert_close(batch.images[0], expected, atol=1e-5, rtol=0)
    assert torch.equal(batch.images[0], batch.images[2])
    assert list(eval_batches(source, [], image_size=32)) == []


@pytest.mark.parametrize("size", [(20, 30), (90, 40), (64, 64)])
def test_other_sizes(tree: Path, size: tuple[int, int]) -> None:
    (batch,) = eval_batches(open_source(str(tree)), image_size=size)
    assert batch.images.shape == (12, 3, *size)
    assert batch.images.amin((1, 2, 3)).max() < -1.0 and batch.images.amax((1, 2, 3)).min() > 1.0
    assert batch.images.std((2, 3)).min() > 0.3


def test_training_crops_are_a_function_of_seed_epoch_position(tree: Path) -> None:
    source = open_source(str(tree))
    options = {"image_size": 24, "train_augment": True, "seed": 3}
    one = joined(list(eval_batches(source, epoch=1, batch_size=12, **options)))  # type: ignore[arg-type]
    two = joined(list(eval_batches(source, range(11, -1, -1), epoch=1, batch_size=5, workers=1, **options)))  # type: ignore[arg-type]
    assert torch.equal(one, two.flip(0))
    three = joined(list(eval_batches(source, epoch=2, **options)))  # type: ignore[arg-type]
    assert not torch.equal(one, three)
    crop, flips = MultiCrop((1,), (24,), (0.08,), (1.0,)), 0
    for i in range(12):
        image = source.load(i)
        drawn = crop.draw(3, 1, i, image.shape[1], image.shape[2])
        expected = TF.resized_crop(image, *drawn.boxes_V4[0].tolist(), [24, 24], antialias=True)
        flips += bool(drawn.params_VP[0, Param.FLIP])
        expected = expected.flip(-1) if drawn.params_VP[0, Param.FLIP] else expected
        expected = TF.normalize(expected.float() / 255, list(MEAN), list(STD))
        assert (one[i] - expected).abs().mean() < 1 / 255 / 0.22
    assert 0 < flips < 12


def test_unreadable_images(tree: Path, tmp_path: Path) -> None:
    (tree / "cat" / "1.png").write_bytes(b"")
    source = open_source(str(tree))
    ledger = BadImages(source, tmp_path / "bad_images.txt")
    (batch,) = eval_batches(source, image_size=24, ledger=ledger)
    assert torch.equal(batch.images[1], batch.images[2]) and ledger.count == 1
    with pytest.raises(UserError, match="max_bad_fraction"):
        list(eval_batches(source, image_size=24, ledger=BadImages(source, max_bad_fraction=0.0)))


def test_bad_numbers() -> None:
    source = open_source("digits", limit=4)
    for options in ({"image_size": 0}, {"image_size": 32, "resize": 0}, {"image_size": 32, "batch_size": 0}):
        with pytest.raises(UserError, match="at least 1"):
            next(eval_batches(source, **options))  # type: ignore[arg-type]


def test_resize_is_the_published_one_and_small_images_stay_whole() -> None:
    assert [resize_for((side, side)) for side in (224, 32, 64, 96)] == [256, 32, 64, 110]
