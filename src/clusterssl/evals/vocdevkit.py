"""PASCAL VOC as it is unpacked: folders, lists of images with their labels, boxes.

Suffixes: N images, C classes.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from clusterssl.data.decode import decode_file
from clusterssl.errors import UserError
from clusterssl.evals.average_precision import IGNORED

_LABELS = {"1": 1, "-1": 0, "0": IGNORED}
_NEEDED = ("ImageSets/Main", "JPEGImages", "Annotations")


def voc_folder(path: str | Path, year: str = "VOC2007", flag: str = "--vocdir") -> Path:
    """The folder that holds ImageSets, JPEGImages and Annotations: `path`, or year or VOCdevkit/year in it.

    Raises:
        UserError: none of them does; says what is there and what is expected.
    """
    if not str(path):
        raise UserError(f"{flag}: name the folder that holds VOCdevkit/{year}")
    path = Path(path).expanduser()
    if not path.is_dir():
        raise UserError(f"{flag} {path}: no such folder; give the one that holds VOCdevkit/{year}")
    for folder in (path / "VOCdevkit" / year, path / year, path):
        if all((folder / part).is_dir() for part in _NEEDED):
            return folder
    found = sorted(entry.name for entry in path.iterdir())
    told = ", ".join(found[:8]) + (" ..." if len(found) > 8 else "") if found else "nothing"
    raise UserError(f"{flag} {path}: holds {told}; expected VOCdevkit/{year} with {', '.join(_NEEDED)}")


class ImageFiles:
    """Image files by path; their labels are their positions, so that what is computed of them can be put in order."""

    classes: list[str] = []  # noqa: RUF012 - a constant

    def __init__(self, paths: Sequence[Path]) -> None:
        """Check that every file is there.

        Raises:
            UserError: one is not.
        """
        missing = [path for path in paths if not path.is_file()]
        if missing:
            raise UserError(f"{missing[0]}: no such image, and {len(missing) - 1} more of those listed are missing")
        self.paths = list(paths)
        self.labels: NDArray[np.int64] = np.arange(len(paths))

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, i: int) -> str:
        """Path of image i."""
        return str(self.paths[i])

    def load(self, i: int) -> Tensor:
        """Image i as uint8 [3, H, W]."""
        return decode_file(self.paths[i])


class Labelled(NamedTuple):
    """The images of a split and which classes they show."""

    images: ImageFiles
    classes: list[str]
    labels_NC: NDArray[np.uint8]
    """1 present, 0 absent, `IGNORED` only difficult objects, or not listed for that class"""


def read_labels(folder: Path, split: str) -> Labelled:
    """Reads ImageSets/Main/<class>_<split>.txt for all classes.

    Raises:
        UserError: no such lists, lines that are none of theirs, or images that are missing.
    """
    lists = folder / "ImageSets" / "Main"
    files = {path.name.removesuffix(f"_{split}.txt"): path for path in sorted(lists.glob(f"*_{split}.txt"))}
    if not files:
        raise UserError(f"{lists}: no lists of {split}; expected one <class>_{split}.txt for every class")
    tables = [_read_list(path) for path in files.values()]
    names = sorted(set().union(*tables))
    if not names:
        raise UserError(f"{lists}: the lists of {split} name no image; the ground truth is empty")
    labels_NC = np.array([[table.get(name, IGNORED) for table in tables] for name in names], dtype=np.uint8)
    images = ImageFiles([folder / "JPEGImages" / f"{name}.jpg" for name in names])
    return Labelled(images, list(files), labels_NC)


def read_pair(folder: Path, train: str, test: str) -> tuple[Labelled, Labelled]:
    """Splits to train and to test on, of the same classes.

    Raises:
        UserError: see `read_labels`; or the classes differ.
    """
    splits = read_labels(folder, train), read_labels(folder, test)
    differing = set(splits[0].classes) ^ set(splits[1].classes)
    if differing:
        raise UserError(f"{folder}: {train} and {test} do not list the same classes ({', '.join(sorted(differing))})")
    return splits


def _read_list(path: Path) -> dict[str, int]:
    table = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        words = line.split()
        if len(words) == 2 and words[1] in _LABELS:
            table[words[0]] = _LABELS[words[1]]
        elif words:
            raise UserError(f"{path}, line {number}: expected an image and 1, -1 or 0, found {line.strip()!r}")
    return table


class Boxes(NamedTuple):
    """Objects of one image."""

    boxes: list[list[float]]
    """left, top, right, bottom in pixels from 0"""
    names: list[str]
    difficult: list[bool]


def read_boxes(path: Path) -> Boxes:
    """Reads one annotation; VOC counts pixels from 1 and both corners belong to the box.

    Raises:
        UserError: missing file, or not one of VOC.
    """
    try:
        objects = ElementTree.parse(path).findall("object")
        found = Boxes([], [], [])
        for entry in objects:
            corners = [float(entry.findtext(f"bndbox/{side}", "")) for side in ("xmin", "ymin", "xmax", "ymax")]
            found.boxes.append([corners[0] - 1, corners[1] - 1, corners[2], corners[3]])
            found.names.append(entry.findtext("name", "").strip())
            found.difficult.append(entry.findtext("difficult", "0").strip() == "1")
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise UserError(f"{path}: no readable annotation of VOC ({error})") from error
    return found
