"""Clusters to look at: the best, the worst and the clearest as pictures, and the most frequent mistakes on one page."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clusterssl.config import require_numbers
from clusterssl.data import Source
from clusterssl.data.evalset import centre_crop
from clusterssl.errors import UserError
from clusterssl.evals.clustering import ClusterTable, confusions, table_of_clusters
from clusterssl.evals.clusters import Found
from clusterssl.files import atomic_write, first_line
from clusterssl.report import Gallery, Table, strip
from clusterssl.report.page import write_page
from clusterssl.report.pictures import grid
from clusterssl.report.tables import table_of

_PIXELS = 128
_ON_PAGE = 64
_MISTAKES = 15


@dataclass(frozen=True)
class PictureOptions:
    """Pictures."""

    num_classes: int = 15
    """clusters in each gallery; 0: no pictures"""
    num_samples_per_class: int = 9
    """random images of each; clusters with fewer are not shown"""

    def __post_init__(self) -> None:
        require_numbers(self, "num_classes", least=0)
        require_numbers(self, "num_samples_per_class", least=1)


def write_pages(
    found: Found, source: Source, records: Sequence[dict[str, Any]], options: PictureOptions, folder: Path, seed: int
) -> list[Path]:
    """Write clusters-<title>.csv, a page clusters-<title>.html and its galleries as PNG; returns all paths.

    Args:
        found: clusters of images of `source`.
        source: the test images.
        records: agreement with classes and superclasses.
        options: how much is shown.
        folder: where the files go.
        seed: of the choice of images.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--dump_path {folder}: cannot be written ({first_line(error)}); choose another") from error
    stem = "clusters-" + re.sub(r"[^a-z0-9]+", "-", found.title.lower()).strip("-")
    whole = table_of_clusters(found.clusters_N, found.labels_N)
    paths = [folder / f"{stem}.csv", folder / f"{stem}.html"]
    text = _csv(whole, source.classes)
    atomic_write(paths[0], lambda file: file.write(text.encode()))
    galleries = []
    shown = whole.ordered(np.flatnonzero(whole.images_P >= options.num_samples_per_class))
    for name, title, order in _choices(shown, options.num_classes):
        pictures = [_members(found, source, int(cluster), options, seed) for cluster in shown.cluster_P[order]]
        paths.append(folder / f"{stem}-{name}.png")
        sheet = grid(pictures, side=_PIXELS)
        atomic_write(paths[-1], lambda file, sheet=sheet: file.write(sheet))  # type: ignore[misc]
        captions = [_caption(found, shown, int(row), source.classes) for row in order]
        strips = tuple(
            (caption, f"{len(images)} random images of {caption}", strip(images, side=_ON_PAGE))
            for caption, images in zip(captions, pictures, strict=True)
        )
        galleries.append(Gallery(title, strips))
    tables = [
        table_of("Agreement with classes and superclasses, percent", records),
        _mistakes(found, source.classes),
    ]
    write_page(
        paths[1], title=f"Clusters: {found.title}", lead=_lead(whole, options), tables=tables, galleries=galleries
    )
    return paths


def _choices(table: ClusterTable, number: int) -> list[tuple[str, str, NDArray[np.int64]]]:
    if not number or not len(table.cluster_P):
        return []
    rows = np.arange(len(table.cluster_P))
    return [
        ("best", "Clusters of highest accuracy", rows[:number]),
        ("worst", "Clusters of lowest accuracy", rows[::-1][:number]),
        ("clearest", "Clusters of lowest entropy", np.argsort(table.entropy_P, kind="stable")[:number]),
    ]


def _members(found: Found, source: Source, cluster: int, options: PictureOptions, seed: int) -> list[NDArray[np.uint8]]:
    """Random images of a cluster, cut to squares."""
    members = found.positions_N[found.clusters_N == cluster]
    chosen = np.random.default_rng([seed, cluster]).choice(members, options.num_samples_per_class, replace=False)
    square = (_PIXELS, _PIXELS)
    return [centre_crop(source.load(int(i)), square, _PIXELS).permute(1, 2, 0).numpy() for i in chosen]


def _caption(found: Found, table: ClusterTable, row: int, classes: Sequence[str]) -> str:
    """What a cluster holds, in words."""
    labels = found.labels_N[found.clusters_N == table.cluster_P[row]]
    counts = np.bincount(labels)
    most = [f"{classes[i]} {counts[i] / len(labels):.0%}" for i in np.argsort(-counts, kind="stable")[:3] if counts[i]]
    return (
        f"cluster {table.cluster_P[row]} as {classes[table.class_P[row]]}: {table.images_P[row]} images, "
        f"{table.accuracy_P[row]:.0%} right, entropy {table.entropy_P[row]:.2f}; {', '.join(most)}"
    )


def _mistakes(found: Found, classes: Sequence[str]) -> Table:
    sizes = np.bincount(found.labels_N, minlength=len(classes))
    rows = tuple(
        (classes[true], classes[named], str(count), f"{count / sizes[true]:.1%}")
        for true, named, count in confusions(found.clusters_N, found.labels_N, _MISTAKES)
    )
    return Table("Most frequent mistakes", ("class", "taken for", "images", "share of the class"), rows)


def _lead(table: ClusterTable, options: PictureOptions) -> str:
    pure, empty = int((table.accuracy_P >= 0.9).sum()), int((table.accuracy_P < 0.1).sum())
    right = (table.accuracy_P * table.images_P).sum() / table.images_P.sum()
    enough = int((table.images_P >= options.num_samples_per_class).sum())
    pictures = f" Pictures are of the {enough} clusters with {options.num_samples_per_class} images or more."
    return (
        f"{len(table.cluster_P)} clusters hold {table.images_P.sum()} images, {table.images_P.min()} to "
        f"{table.images_P.max()} each. {right:.1%} of the images are of the class that their cluster stands for; "
        f"{pure} clusters are right for 90 % of their images or more, {empty} for less than 10 %."
        + (pictures if options.num_classes else "")
    )


def _csv(table: ClusterTable, classes: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["cluster", "class", "images", "accuracy", "entropy"])
    for cluster, name, images, accuracy, entropy in zip(*table, strict=True):
        writer.writerow([cluster, classes[name], images, f"{accuracy:.6f}", f"{entropy:.6f}"])
    return text.getvalue()
