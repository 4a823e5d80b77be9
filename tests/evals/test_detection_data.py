"""Folders of objects for detection: what is wrong with them, mirroring."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from clusterssl.errors import UserError
from clusterssl.evals.detection_data import mirrored, open_sets
from tests.evals.voc import CLASSES, tiny_voc


def test_mirrored() -> None:
    image = torch.arange(60, dtype=torch.uint8).view(3, 4, 5)
    target = {"boxes": torch.tensor([[1.0, 0, 3, 2]]), "labels": torch.tensor([2]),
              "masks": torch.tensor([[[0, 1, 1, 0, 0]]], dtype=torch.uint8)}  # fmt: skip
    other, moved = mirrored(image, target)
    assert torch.equal(other, image.flip(2)) and moved["boxes"].tolist() == [[2, 0, 4, 2]]
    assert moved["masks"].tolist() == [[[0, 0, 1, 1, 0]]] and torch.equal(moved["labels"], target["labels"])
    again = mirrored(*mirrored(image, target))
    assert torch.equal(again[0], image) and torch.equal(again[1]["boxes"], target["boxes"])


def test_what_is_wrong_with_a_folder(tmp_path: Path) -> None:
    root = tiny_voc(tmp_path / "voc", {"trainval": 4, "test": 3})
    coco = tmp_path / "coco"
    (coco / "annotations").mkdir(parents=True)
    for path, years, masks, message in (
        ("", (2007,), False, "--data_path: name the folder"),
        (tmp_path / "none", (2007,), False, "no such folder"),
        (root, (2007, 2012), False, "expected VOCdevkit/VOC2012 .* of COCO; without it give --voc_years 2007$"),
        (root, (2007,), True, "masks need COCO's annotations/"),
        (coco, (2007,), False, "found annotations, expected annotations/instances_train2017.json"),
    ):
        with pytest.raises(UserError, match=message):
            open_sets(str(path), years, masks)
    empty = {"images": [{"id": 1, "file_name": "a.jpg", "height": 5, "width": 5}], "annotations": [], "categories": []}
    for split in ("train2017", "val2017"):
        (coco / split).mkdir()
        (coco / split / "a.jpg").touch()
        (coco / "annotations" / f"instances_{split}.json").write_text(json.dumps(empty))
    with pytest.raises(UserError, match="no image has an object to be found; the ground truth is empty"):
        open_sets(str(coco), (2007,), False)
    wrong = {**empty, "annotations": [{"image_id": 9, "bbox": [0, 0, 1, 1]}]}
    (coco / "annotations" / "instances_val2017.json").write_text(json.dumps(wrong))
    with pytest.raises(UserError, match="no readable annotations of COCO"):
        open_sets(str(coco), (2007,), False)


def test_tiny_folders_have_their_own_classes(tmp_path: Path) -> None:
    train, test = open_sets(str(tiny_voc(tmp_path, {"trainval": 8, "test": 5})), (2007,), masks=False)
    assert train.classes == test.classes == list(CLASSES)
    assert np.unique(train.labels_K).tolist() == [1, 2, 3] and (train.areas_K == 24 * 24).all()
