"""Batches of crops: every row is what its own key says, whatever stands beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as TF

from clusterssl.data import MultiCrop, MultiCropDataset, collate, open_source
from clusterssl.errors import UserError

SMALL = MultiCrop((2, 1), (32, (24, 16)), (0.3, 0.2), (1.0, 0.5))
LARGE = MultiCrop((1, 2), (80, 40), (0.3, 0.05), (1.0, 0.3))


@pytest.mark.parametrize("data", ["digits", "tree"])
@pytest.mark.parametrize("crop", [SMALL, LARGE])
def test_rows_do_not_depend_on_company(data: str, crop: MultiCrop, tree: Path) -> None:
    source = open_source(str(tree) if data == "tree" else data)
    dataset = MultiCropDataset(source, crop, 31)
    keys = [(0, 5), (1, 5), (0, 11), (7, 0), (0, 3)]
    whole = dataset.__getitems__(keys)
    assert [tuple(view.shape) for view in whole.crops] == [(5, 3, *size) for size in crop.sizes]
    assert whole.params.shape[:2] == (crop.num_views, 5) and whole.index.tolist() == [5, 5, 11, 0, 3]
    for row, key in enumerate(keys):
        single = dataset[key]
        for view in range(crop.num_views):
            assert torch.equal(single.crops[view][0], whole.crops[view][row])
        assert torch.equal(single.params[:, 0], whole.params[:, row])
    assert not torch.equal(whole.crops[0][0], whole.crops[0][1])


def test_mixed_sizes_beside_small_ones(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i, side in enumerate([32, 32, 200, 32]):
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    dataset = MultiCropDataset(open_source(str(tmp_path)), SMALL, 0)
    small, mixed = dataset.__getitems__([(0, 0), (0, 1), (0, 3)]), dataset.__getitems__([(0, 0), (0, 2), (0, 3)])
    for view in range(3):
        assert torch.equal(small.crops[view][0], mixed.crops[view][0])
        assert torch.equal(small.crops[view][2], mixed.crops[view][2])


def test_crops_are_torchvisions_resized_crops(tree: Path) -> None:
    source = open_source(str(tree))
    batch = MultiCropDataset(source, LARGE, 31)[(2, 7)]
    image = source.load(7)
    drawn = LARGE.draw(31, 2, 7, image.shape[1], image.shape[2])
    for view, box, size in zip(batch.crops, drawn.boxes_V4.tolist(), LARGE.sizes, strict=True):
        expected = TF.resized_crop(image, *box, list(size), antialias=True)
        assert (view[0].float() - expected.float()).abs().mean() < 0.5
    np.testing.assert_array_equal(batch.params[:, 0].numpy(), drawn.params_VP)


def test_collate_joins_rows() -> None:
    dataset = MultiCropDataset(open_source("digits"), SMALL, 31)
    keys = [(0, 5), (0, 6), (0, 7)]
    joined, whole = collate([dataset[key] for key in keys]), dataset.__getitems__(keys)
    assert all(torch.equal(a, b) for a, b in zip(joined.crops, whole.crops, strict=True))
    assert torch.equal(joined.params, whole.params) and torch.equal(joined.index, whole.index)


def test_unreadable_images_are_replaced_by_their_neighbour(tree: Path) -> None:
    (tree / "cat" / "1.png").write_bytes(b"")
    (tree / "cat" / "2.png").write_bytes(b"no image")
    (tree / "eel" / "3.png").write_bytes(b"no image")
    source = open_source(str(tree))
    dataset = MultiCropDataset(source, LARGE, 31)
    batch = dataset.__getitems__([(0, 0), (0, 1), (0, 11)])
    assert batch.bad == [(1, "empty file"), (2, batch.bad[1][1]), (11, batch.bad[2][1])]
    assert "not an image" in batch.bad[1][1]
    assert batch.index.tolist() == [0, 1, 11]
    boxes = LARGE.draw(31, 0, 1, *source.load(3).shape[1:]).boxes_V4
    expected = TF.resized_crop(source.load(3), *boxes[0].tolist(), [80, 80], antialias=True)
    assert (batch.crops[0][1].float() - expected.float()).abs().mean() < 0.5


def test_nothing_but_unreadable_images(tmp_path: Path) -> None:
    for i in range(5):
        (tmp_path / f"{i}.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"5 unreadable images in a row from .*2\.jpg on \(empty file\)"):
        MultiCropDataset(open_source(str(tmp_path)), SMALL, 0)[(0, 2)]
