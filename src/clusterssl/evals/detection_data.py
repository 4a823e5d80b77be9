"""Objects in images for detectors: VOC07+12 and COCO folders. Suffixes: K objects of all images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clusterssl.data.dataset import Key
from clusterssl.data.decode import BadImageError
from clusterssl.data.loader import Guarded, quiet_worker, same
from clusterssl.errors import UserError
from clusterssl.evals.vocdevkit import ImageFiles, read_boxes, voc_folder
from clusterssl.files import first_line
from clusterssl.rng import Stream, uniform

Target = dict[str, Tensor]
"""boxes float32 [n, 4] (left, top, right, bottom), labels int64 [n] from 1; for Mask R-CNN masks uint8 [n, H, W]; for
the evaluation iscrowd bool [n] (not counted, neither found nor missed) and area float32 [n]"""


class DetectionSet(NamedTuple):
    """Images and all their objects in flat arrays."""

    images: ImageFiles
    classes: list[str]
    ends: NDArray[np.int64]
    """position in the arrays below where the objects of each image end"""
    boxes_K4: NDArray[np.float32]
    labels_K: NDArray[np.int64]
    ignored_K: NDArray[np.bool_]
    """difficult objects of VOC, crowds of COCO: not trained on, not counted in the evaluation"""
    areas_K: NDArray[np.float32]
    masks_K: list[Any]
    """run-length codes; empty without masks"""

    def target(self, i: int, *, all_objects: bool) -> Target:
        """Objects of image i; for training only those that are not ignored."""
        rows = np.arange(self.ends[i - 1] if i else 0, self.ends[i])
        if not all_objects:
            rows = rows[~self.ignored_K[rows]]
        target = {
            "boxes": torch.from_numpy(self.boxes_K4[rows]), "labels": torch.from_numpy(self.labels_K[rows]),
            "iscrowd": torch.from_numpy(self.ignored_K[rows]), "area": torch.from_numpy(self.areas_K[rows]),
        }  # fmt: skip
        return target | ({"masks": _decoded([self.masks_K[k] for k in rows])} if self.masks_K else {})

    def with_objects(self) -> NDArray[np.int64]:
        """Images that can be trained on."""
        counted = np.concatenate([[0], np.cumsum(~self.ignored_K)])
        starts = np.concatenate([[0], self.ends[:-1]])
        return np.flatnonzero(counted[self.ends] > counted[starts])


def open_sets(data_path: str, voc_years: Sequence[int], masks: bool) -> tuple[DetectionSet, DetectionSet]:
    """Images to train and to test on, of a COCO or a VOC folder.

    Args:
        data_path: holds annotations/instances_train2017.json, train2017/ ...; or VOCdevkit/VOC2007 ...
        voc_years: years whose trainval is trained on; the test set is that of 2007.
        masks: read masks too, which VOC does not have for most images.

    Raises:
        UserError: neither of them, or something in it is missing or empty; says what was found and what is expected.
    """
    if not data_path:
        raise UserError("--data_path: name the folder that holds VOCdevkit/VOC2007, or COCO's annotations and images")
    path = Path(data_path).expanduser()
    if (path / "annotations").is_dir():
        train, test = (_coco(path, split, masks) for split in ("train2017", "val2017"))
    elif masks:
        raise UserError(f"--data_path {path}: masks need COCO's annotations/; VOC has boxes, take another --detector")
    else:
        train, test = _voc(path, voc_years)
    if not len(train.with_objects()) or not len(test.with_objects()):
        raise UserError(f"--data_path {path}: no image has an object to be found; the ground truth is empty")
    if train.classes != test.classes:
        raise UserError(f"--data_path {path}: the images to train and to test on have different classes")
    return train, test


def _voc(path: Path, years: Sequence[int]) -> tuple[DetectionSet, DetectionSet]:
    sides = [_voc_objects(path, years, "trainval"), _voc_objects(path, (2007,), "test")]
    classes = sorted({str(entry[2]) for _, entries in sides for entry in entries})
    number = {name: c for c, name in enumerate(classes, start=1)}
    train, test = (
        _set(images, classes, [(*e[:2], number[e[2]], *e[3:]) for e in entries]) for images, entries in sides
    )
    return train, test


def _voc_objects(path: Path, years: Sequence[int], split: str) -> tuple[list[Path], list[Any]]:
    images: list[Path] = []
    entries: list[Any] = []
    for year in years:
        folder = _year(path, year, [other for other in years if other != year])
        listed = folder / "ImageSets" / "Main" / f"{split}.txt"
        try:
            names = listed.read_text().split()
        except OSError as error:
            raise UserError(f"{listed}: {first_line(error)}; expected the names of the images of {split}") from error
        for name in names:
            for box, word, ignored in zip(*read_boxes(folder / "Annotations" / f"{name}.xml"), strict=True):
                entries.append((len(images), box, word, ignored, (box[2] - box[0]) * (box[3] - box[1]), None))
            images.append(folder / "JPEGImages" / f"{name}.jpg")
    return images, entries


def _year(path: Path, year: int, others: Sequence[int]) -> Path:
    try:
        return voc_folder(path, f"VOC{year}", "--data_path")
    except UserError as error:
        without = f"; without it give --voc_years {' '.join(map(str, others))}" if others else ""
        coco = ", or annotations, train2017 and val2017 of COCO" if path.is_dir() else ""
        raise UserError(f"{error}{coco}{without}") from error


def _coco(path: Path, split: str, masks: bool) -> DetectionSet:
    file = path / "annotations" / f"instances_{split}.json"
    try:
        content = json.loads(file.read_text())
        images = {image["id"]: image for image in content["images"]}
        categories = sorted(content["categories"], key=lambda category: category["id"])
        number = {category["id"]: c for c, category in enumerate(categories, start=1)}
        place = {key: i for i, key in enumerate(sorted(images))}
        entries = []
        for entry in content["annotations"]:
            left, top, wide, high = entry["bbox"]
            image, size = entry["image_id"], (images[entry["image_id"]]["height"], images[entry["image_id"]]["width"])
            code = _encoded(entry["segmentation"], size) if masks else None
            if wide > 0 and high > 0:
                box = [left, top, left + wide, top + high]
                entries.append((place[image], box, number[entry["category_id"]], bool(entry.get("iscrowd")),
                                float(entry["area"]), code))  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8])
        raise UserError(
            f"{file}: no readable annotations of COCO ({type(error).__name__}: {first_line(error)}); found {found}, "
            f"expected annotations/instances_train2017.json, instances_val2017.json, train2017/, val2017/"
        ) from error
    files = [path / split / images[key]["file_name"] for key in sorted(images)]
    return _set(files, [category["name"] for category in categories], entries)


def _set(
    images: list[Path], classes: list[str], entries: list[tuple[int, list[float], int, bool, float, Any]]
) -> DetectionSet:
    entries.sort(key=lambda entry: entry[0])
    ends = np.searchsorted([entry[0] for entry in entries], np.arange(len(images)), side="right")
    return DetectionSet(
        ImageFiles(images), classes, ends,
        np.array([entry[1] for entry in entries], dtype=np.float32).reshape(-1, 4),
        np.array([entry[2] for entry in entries], dtype=np.int64),
        np.array([entry[3] for entry in entries], dtype=bool),
        np.array([entry[4] for entry in entries], dtype=np.float32),
        [entry[5] for entry in entries if entry[5] is not None],
    )  # fmt: skip


def _encoded(segmentation: Any, size: tuple[int, int]) -> Any:
    from faster_coco_eval.core import mask

    return mask.segmToRle(segmentation, w=size[1], h=size[0])


def _decoded(codes: Sequence[Any]) -> Tensor:
    from faster_coco_eval.core import mask

    if not codes:
        return torch.zeros(0, 1, 1, dtype=torch.uint8)
    return torch.from_numpy(np.ascontiguousarray(mask.decode(list(codes)).transpose(2, 0, 1)))


class _Objects(Dataset[Any]):
    """Images with their targets; in training mirrored with probability 1/2, by (seed, epoch, position)."""

    def __init__(self, images: DetectionSet, training: bool, seed: int) -> None:
        self.images, self.training, self.seed = images, training, seed

    def __len__(self) -> int:
        return len(self.images.images)

    def __getitems__(self, keys: Sequence[Key]) -> list[tuple[Tensor, Target, int]]:
        return [(*self._one(epoch, i), i) for epoch, i in keys]

    def _one(self, epoch: int, i: int) -> tuple[Tensor, Target]:
        try:
            image = self.images.images.load(i)
        except BadImageError as error:
            raise UserError(f"{self.images.images.name(i)}: {error}; repair it or take it off the list") from error
        target = self.images.target(i, all_objects=not self.training)
        if self.training and uniform(self.seed, Stream.CROPS, epoch, [i], 1)[0, 0] < 0.5:
            image, target = mirrored(image, target)
        return image.contiguous(), target


def mirrored(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """Image [3, H, W] and objects, left and right exchanged."""
    boxes = target["boxes"].clone()
    boxes[:, [0, 2]] = image.shape[-1] - boxes[:, [2, 0]]
    masks = {"masks": target["masks"].flip(-1)} if "masks" in target else {}
    return image.flip(-1), {**target, "boxes": boxes, **masks}


def object_batches(
    images: DetectionSet, batches: Sequence[Sequence[Key]], *, training: bool, seed: int, workers: int
) -> DataLoader[Any]:
    """Loader of lists of (image uint8 [3, H, W], target, position)."""
    return DataLoader(
        Guarded(_Objects(images, training, seed)), batch_sampler=[list(batch) for batch in batches], collate_fn=same,
        num_workers=workers, worker_init_fn=quiet_worker, generator=torch.Generator(),
    )  # fmt: skip
