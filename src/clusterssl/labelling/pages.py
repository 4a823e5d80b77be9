"""What a labelling looks like: clusters as strips of thumbnails, duplicates and outliers, nearest images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clusterssl.config import require_numbers
from clusterssl.data import BadImageError, Source
from clusterssl.data.evalset import centre_crop
from clusterssl.evals.clustering import agreement
from clusterssl.evals.gallery import mostly
from clusterssl.labelling.clusters import Labels
from clusterssl.labelling.neighbourhood import Duplicates, Outliers
from clusterssl.log import counted
from clusterssl.report import Gallery, Strip, Table, strip
from clusterssl.report.page import write_page

logger = logging.getLogger(__name__)

_ON_PAGE = 64
_LISTED = 400
_GROUPS = 12


@dataclass(frozen=True)
class PageOptions:
    """Page."""

    num_classes: int = 12
    """clusters in each part of the gallery; 0: no pictures"""
    num_samples_per_class: int = 10
    """images of each"""

    def __post_init__(self) -> None:
        require_numbers(self, "num_classes", least=0)
        require_numbers(self, "num_samples_per_class", least=1)


class Clusters:
    """The clusters of a labelling that hold images, with what is said of each."""

    def __init__(self, labels: Labels, source: Source) -> None:
        self.labels, self.source = labels, source
        self.order = np.lexsort((-labels.confidence_N, labels.clusters_N))
        self.ids, self._starts, self.sizes = np.unique(
            labels.clusters_N[self.order], return_index=True, return_counts=True
        )
        sums = np.add.reduceat(labels.confidence_N[self.order].astype(np.float64), self._starts)
        self.confidence = sums / self.sizes

    def members(self, row: int) -> NDArray[np.int64]:
        """Dataset positions of the cluster in this row, the most confident first."""
        start = self._starts[row]
        return self.labels.positions_N[self.order[start : start + self.sizes[row]]]

    def purity(self) -> NDArray[np.float64] | None:
        """Of each cluster the share of its most frequent class; None where classes are unknown."""
        labels_N = self.source.labels[self.labels.positions_N]
        if not self.source.classes or (labels_N < 0).any():
            return None
        most = [np.bincount(self.source.labels[self.members(row)]).max() for row in range(len(self.ids))]
        return np.array(most) / self.sizes

    def strip(self, row: int, count: int, purity: NDArray[np.float64] | None) -> Strip:
        """The most confident images of a cluster."""
        caption, members = self.caption(row), self.members(row)[:count]
        words = f"The {len(members)} most confident images of {caption}"
        pure = None if purity is None else float(purity[row])
        return Strip(caption, words, thumbnails(self.source, members), int(self.sizes[row]), pure)

    def caption(self, row: int) -> str:
        """What a cluster is, in words; classes are named where the images' folders are classes."""
        known = mostly(self.source.labels[self.members(row)], self.source.classes)
        images = "1 image" if self.sizes[row] == 1 else f"{self.sizes[row]} images"
        return f"cluster {self.ids[row]}: {images}, confidence {self.confidence[row]:.2f}{known}"

    def table(self) -> Table:
        """One row a cluster, the largest first."""
        order = np.argsort(-self.sizes, kind="stable")
        rows = tuple(
            (str(self.ids[row]), str(self.sizes[row]), f"{self.confidence[row]:.3f}") for row in order[:_LISTED]
        )
        left = len(order) - len(rows)
        note = f"The {left} smaller ones are in clusters.csv." if left else ""
        return Table("Clusters, the largest first", ("cluster", "images", "mean confidence"), rows, note)


def accuracy_in_words(labels: Labels, source: Source) -> tuple[dict[str, float], str]:
    """Agreement with the folders where they are classes: percent, and a sentence; nothing where they are none."""
    classes_N = source.labels[labels.positions_N]
    if not source.classes or len(source.classes) < 2 or (classes_N < 0).any():
        return {}, ""
    scores = agreement(labels.clusters_N, classes_N)
    text = (
        f" Compared with the {len(source.classes)} folders as classes: Hungarian accuracy "
        f"{scores['hungarian_accuracy']:.1f} %, NMI {scores['nmi']:.1f} %, ARI {scores['ari']:.1f} %."
    )
    if len(np.unique(labels.clusters_N)) > len(source.classes):
        text += f" Clusters named by their most frequent class are right for {scores['label_accuracy']:.1f} %."
    return scores, text


def write_clusters_page(
    path: Path, clusters: Clusters, options: PageOptions, *, title: str, lead: str,
    copies: Duplicates | None, odd: Outliers | None,
) -> None:  # fmt: skip
    """The page of a labelling.

    Raises:
        UserError: it cannot be written.
    """
    purity, count = clusters.purity(), options.num_samples_per_class
    galleries = [
        Gallery(heading, tuple(clusters.strip(int(row), count, purity) for row in rows), _NOTE + order, wide=True)
        for heading, rows, order in _parts(clusters, options)
    ]
    source = clusters.source
    if copies is not None and copies.groups and options.num_classes:
        shown = [group[: options.num_samples_per_class] for group in copies.groups[:_GROUPS]]
        words = [
            f"{len(group)} images: {Path(source.name(int(group[0]))).name}, ..." for group in copies.groups[:_GROUPS]
        ]
        strips = tuple(
            (word, f"Duplicates, {word}", thumbnails(source, part)) for word, part in zip(words, shown, strict=True)
        )
        galleries.append(
            Gallery("Duplicates", strips, f"{counted(len(copies.groups), 'group')}, listed in duplicates.csv.", True)
        )
    if odd is not None and len(odd.positions_O) and options.num_classes:
        part = odd.positions_O[: 2 * options.num_samples_per_class]
        word = f"the {len(part)} farthest of {len(odd.positions_O)}"
        note = f"Mean distance to their neighbours above {odd.threshold:.3f}, listed in outliers.csv."
        galleries.append(Gallery("Outliers", ((word, f"Outliers, {word}", thumbnails(source, part)),), note, True))
    write_page(path, title=title, lead=lead, tables=[clusters.table()], galleries=galleries)


_NOTE = "The images of highest confidence, the most confident first."


def _parts(clusters: Clusters, options: PageOptions) -> list[tuple[str, NDArray[np.int64], str]]:
    """Rows of the clusters in each part of the gallery, and their order in words; where they are few, all in one."""
    number = options.num_classes
    if not number:
        return []
    by_size, by_doubt = np.argsort(-clusters.sizes, kind="stable"), np.argsort(clusters.confidence, kind="stable")
    if len(by_size) <= 3 * number:
        return [("All clusters, the largest first", by_size, "")]
    return [
        ("Largest clusters", by_size[:number], ""),
        ("Smallest clusters", by_size[::-1][:number], ""),
        ("Surest clusters", by_doubt[::-1][:number], " Clusters by mean confidence."),
        ("Most doubtful clusters", by_doubt[:number], " Clusters by mean confidence."),
    ]


def thumbnails(source: Source, positions: Sequence[int] | NDArray[np.int64]) -> str:
    """A strip of images, cut to squares, as a data address."""
    return strip([square(source, int(i)) for i in positions], side=_ON_PAGE, photo=True)


def square(source: Source, position: int, side: int = _ON_PAGE) -> NDArray[np.uint8]:
    """The centre of an image, uint8 [side, side, 3]; grey where it cannot be read any more."""
    try:
        return centre_crop(source.load(position), (side, side), side).permute(1, 2, 0).numpy()
    except BadImageError:
        return np.full((side, side, 3), 128, dtype=np.uint8)
