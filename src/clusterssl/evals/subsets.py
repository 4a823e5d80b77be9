"""Which training images a protocol knows the labels of: all, those of a list, or a share of every class."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clusterssl import dist
from clusterssl.config import require
from clusterssl.data import Source
from clusterssl.errors import UserError
from clusterssl.files import first_line
from clusterssl.models.download import fetch, is_url
from clusterssl.rng import Stream, uniform

logger = logging.getLogger(__name__)

PUBLISHED = "https://raw.githubusercontent.com/google-research/simclr/master/imagenet_subsets/{percent:g}percent.txt"
"""the ImageNet images of which all published few-label results know the label, 1 % and 10 %"""


@dataclass(frozen=True)
class LabelOptions:
    """Labelled images."""

    label_subset: float = 100.0
    """share of the training images that is used, in percent: 1, 10, 100"""
    label_list: str = ""
    """list of these images, one name or class/name a line: a file, an address, or "published" for the 1 % and 10 % of
    ImageNet by SimCLR; without it that share of every class is drawn by --seed"""

    def __post_init__(self) -> None:
        share = self.label_subset
        require(0 < share <= 100, f"--label_subset {share:g}: a share in percent lies above 0 and is at most 100")

    def choose(self, source: Source, seed: int) -> NDArray[np.int64] | None:
        """Positions of the labelled images, ascending; None for all. Raises as `labelled`."""
        if self.label_subset == 100 and not self.label_list:
            return None
        return labelled(source, self.label_subset, self.label_list, seed)


def labelled(source: Source, percent: float, label_list: str, seed: int) -> NDArray[np.int64]:
    """Dataset positions of the labelled images, ascending.

    Args:
        source: training images.
        percent: share of them.
        label_list: file, address or "published"; empty: a share of every class is drawn.
        seed: of that draw.

    Raises:
        UserError: the list does not exist, cannot be read, or names images that are not there or not unique.
    """
    if label_list == "published" and percent not in (1, 10):
        raise UserError(f"--label_list published: exists for 1 and 10 percent, not for {percent:g}; give one of these")
    if not label_list:
        chosen = stratified(source.labels, percent, seed)
    else:
        where = PUBLISHED.format(percent=percent) if label_list == "published" else label_list
        chosen = listed(source, _lines(where), where)
    without = len(source.classes) - len(np.unique(source.labels[chosen]))
    if dist.rank() == 0:
        told = f"; {without} classes have none" if without else ""
        logger.info("%d of %d training images are labelled%s", len(chosen), len(source), told)
    return chosen


def stratified(labels_N: ArrayLike, percent: float, seed: int) -> NDArray[np.int64]:
    """Positions of that share of every class, at least one image each, ascending.

    A function of its arguments alone; smaller shares are parts of larger ones. Unlabelled images (-1) are left out.
    """
    labels_N = np.asarray(labels_N)
    keys_N = uniform(seed, Stream.SPLIT, 1, np.arange(len(labels_N)), 1)[:, 0]
    chosen = []
    for label in np.unique(labels_N[labels_N >= 0]):
        members = np.flatnonzero(labels_N == label)
        number = max(1, round(len(members) * percent / 100))
        chosen.append(members[np.argsort(keys_N[members], kind="stable")[:number]])
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def listed(source: Source, lines: list[str], where: str) -> NDArray[np.int64]:
    """Positions of the images named by a list, ascending.

    Args:
        source: images.
        lines: names, with as many of the folders above them as make them unique.
        where: how errors call the list.

    Raises:
        UserError: nothing in the list, or names of no image or of several.
    """
    wanted: dict[str, list[int]] = {line: [] for line in lines}
    if not wanted:
        raise UserError(f"--label_list {where}: names no images; write one name a line")
    depths = sorted({line.count("/") + 1 for line in wanted})
    for i in range(len(source)):
        parts = source.name(i).split("/")
        for depth in depths:
            found = wanted.get("/".join(parts[-depth:]))
            if found is not None:
                found.append(i)
    absent = [line for line, found in wanted.items() if not found]
    if absent:
        raise UserError(
            f"--label_list {where}: {len(absent)} of {len(wanted)} names are no training images (first: {absent[0]}); "
            "give the list of this dataset"
        )
    several = [line for line, found in wanted.items() if len(found) > 1]
    if several:
        count = len(wanted[several[0]])
        raise UserError(f"--label_list {where}: {several[0]} names {count} images; write class/{several[0]}")
    return np.unique(np.array([i for found in wanted.values() for i in found], dtype=np.int64))


def _lines(where: str) -> list[str]:
    path = str(fetch(where)[0]) if is_url(where) else where
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"--label_list {where}: cannot be read ({reason})") from error
    return [line.strip().removeprefix("./") for line in text.splitlines() if line.strip()]
