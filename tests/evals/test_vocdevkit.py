"""Reading VOCdevkit folders: the golden table, the real subset, and what is wrong with a folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from clusterssl.errors import UserError
from clusterssl.evals.vocdevkit import read_boxes, read_labels, voc_folder
from tests.evals.voc import tiny_voc, unpacked
from tests.golden_files import Golden

GOLDEN = Golden("eval_metrics")


def test_golden_labels(tmp_path: Path) -> None:
    table, listed = GOLDEN["vocparse_annotations"], GOLDEN["vocparse_listed"]
    main = tmp_path / "ImageSets" / "Main"
    main.mkdir(parents=True)
    (tmp_path / "JPEGImages").mkdir()
    for image in range(table.shape[1]):
        (tmp_path / "JPEGImages" / f"{image:06}.jpg").touch()
    for c, (values, present) in enumerate(zip(table, listed, strict=True)):
        lines = [f"{image:06} {values[image]:2d}" for image in np.flatnonzero(present)]
        (main / f"class{c:02}_trainval.txt").write_text("\n".join(lines) + "\n\n")
    found = read_labels(tmp_path, "trainval")
    np.testing.assert_array_equal(found.labels_NC, GOLDEN["vocparse_labels"])
    assert found.classes[3] == "class03" and found.images.name(4).endswith("JPEGImages/000004.jpg")


def test_the_real_subset(tmp_path: Path) -> None:
    folder = voc_folder(unpacked("voc2007-subset", tmp_path))
    test, trainval = read_labels(folder, "test"), read_labels(folder, "trainval")
    assert test.labels_NC.shape == (90, 20) and trainval.labels_NC.shape == (160, 20)
    assert test.classes == trainval.classes == sorted(test.classes) and "train" in test.classes
    assert ((test.labels_NC == 1).sum(0) >= 4).all() and (test.labels_NC == 255).any()
    for row, i in zip(test.labels_NC, range(90), strict=True):  # boxes and lists say the same
        boxes = read_boxes(folder / "Annotations" / f"{Path(test.images.name(i)).stem}.xml")
        plain = {name for name, difficult in zip(boxes.names, boxes.difficult, strict=True) if not difficult}
        assert {name for name, label in zip(test.classes, row, strict=True) if label == 1} == plain
        assert {name for name, label in zip(test.classes, row, strict=True) if label == 255} == set(boxes.names) - plain
        _, height, width = test.images.load(i).shape
        assert all(0 <= b[0] < b[2] <= width and 0 <= b[1] < b[3] <= height for b in boxes.boxes)


def test_folders_are_found_from_above_and_within(tmp_path: Path) -> None:
    root = tiny_voc(tmp_path)
    for path in (root, root / "VOCdevkit", root / "VOCdevkit" / "VOC2007"):
        assert voc_folder(path) == root / "VOCdevkit" / "VOC2007"
    with pytest.raises(UserError, match=r"holds VOCdevkit; expected VOCdevkit/VOC2012 with ImageSets/Main"):
        voc_folder(root, "VOC2012")


def test_what_is_wrong_with_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        voc_folder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds nothing; expected VOCdevkit/VOC2007"):
        voc_folder(tmp_path / "empty")
    folder = voc_folder(tiny_voc(tmp_path))
    with pytest.raises(UserError, match=r"no lists of val; expected one <class>_val\.txt"):
        read_labels(folder, "val")
    (folder / "JPEGImages" / "000003.jpg").unlink()
    with pytest.raises(UserError, match=r"000003.jpg: no such image, and 0 more"):
        read_labels(folder, "trainval")
    path = folder / "ImageSets" / "Main" / "cup_test.txt"
    path.write_text("000024 1\n000025 present\n")
    with pytest.raises(UserError, match=r"cup_test\.txt, line 2: expected an image and 1, -1 or 0"):
        read_labels(folder, "test")
    for name in ("ball", "cup", "tree"):
        (folder / "ImageSets" / "Main" / f"{name}_test.txt").write_text("")
    with pytest.raises(UserError, match="the ground truth is empty"):
        read_labels(folder, "test")
    (folder / "Annotations" / "000001.xml").write_text("<annotation><object>")
    for name in ("000001", "none"):
        with pytest.raises(UserError, match="no readable annotation of VOC"):
            read_boxes(folder / "Annotations" / f"{name}.xml")
