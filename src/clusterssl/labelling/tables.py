"""The files a labelling leaves: CSV and Parquet of all images, a folder of links per cluster, lists of a few images.

Legend of suffixes: N readable images.
"""

from __future__ import annotations

import csv
import io
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from clusterssl.data import Source
from clusterssl.errors import UserError
from clusterssl.files import atomic_write, first_line
from clusterssl.labelling.clusters import Labels
from clusterssl.labelling.neighbourhood import Duplicates, Outliers

logger = logging.getLogger(__name__)

COLUMNS = ("path", "cluster", "confidence", "second", "second_confidence")
_ROWS = 65536


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A CSV file, written row by row, that is whole or absent.

    Raises:
        UserError: it cannot be written.
    """

    def write(file: IO[bytes]) -> None:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="", write_through=True)
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
        text.detach()

    atomic_write(path, write)


def label_rows(labels: Labels, source: Source) -> Iterator[tuple[Any, ...]]:
    """One row an image, in the order of `COLUMNS`; the image's folder as its class where folders are classes."""
    for at, position in enumerate(labels.positions_N.tolist()):
        yield (
            source.name(position), int(labels.clusters_N[at]), f"{labels.confidence_N[at]:.6f}",
            int(labels.second_N[at]), f"{labels.second_confidence_N[at]:.6f}",
        )  # fmt: skip


def write_parquet(path: Path, labels: Labels, source: Source) -> bool:
    """The same as a Parquet file, where pyarrow is installed; whether it is.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        return False
    kinds = (pa.string(), pa.int32(), pa.float32(), pa.int32(), pa.float32())
    schema = pa.schema(list(zip(COLUMNS, kinds, strict=True)))

    def write(file: IO[bytes]) -> None:
        with pq.ParquetWriter(file, schema) as writer:
            for start in range(0, len(labels.positions_N), _ROWS):
                part = slice(start, start + _ROWS)
                names = [_text(source.name(int(i))) for i in labels.positions_N[part]]
                columns = [names, *(values[part] for values in labels[3:])]
                writer.write_table(
                    pa.table([pa.array(c, k) for c, k in zip(columns, kinds, strict=True)], schema=schema)
                )

    atomic_write(path, write)
    return True


def _text(name: str) -> str:
    """A name as UTF-8 can hold it."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def check_links(source: Source) -> None:
    """Refuse images that are no files of their own.

    Raises:
        UserError: they are packed or built in.
    """
    first = Path(source.name(0))
    if not first.is_file():
        raise UserError(f"--links: {first} is no file that a link could lead to; leave the flag out")


def write_links(folder: Path, labels: Labels, source: Source) -> int:
    """One folder a cluster, of symbolic links to its images; links of an earlier labelling are removed. How many.

    Raises:
        UserError: the images are no files, or the folder cannot be written.
    """
    check_links(source)
    try:
        _remove_links(folder)
        width = len(str(int(labels.clusters_N.max())))
        for cluster in np.unique(labels.clusters_N):
            (folder / f"{cluster:0{width}}").mkdir(parents=True, exist_ok=True)
        for position, cluster in zip(labels.positions_N.tolist(), labels.clusters_N.tolist(), strict=True):
            image = os.path.abspath(source.name(position))  # noqa: PTH100 - links of the user's own stay as they are
            inner = folder / f"{cluster:0{width}}"
            link = inner / Path(image).name
            if os.path.lexists(link):
                link = inner / f"{link.stem}-{position}{link.suffix}"
            link.symlink_to(image)
    except OSError as error:
        raise UserError(f"--links {folder}: could not be written ({first_line(error)})") from error
    return len(labels.positions_N)


def _remove_links(folder: Path) -> None:
    for inner in folder.iterdir() if folder.is_dir() else ():
        links = [entry for entry in inner.iterdir() if entry.is_symlink()] if inner.is_dir() else []
        for link in links:
            link.unlink()
        if inner.is_dir() and not any(inner.iterdir()):
            inner.rmdir()


def duplicate_rows(found: Duplicates, name: Callable[[int], str]) -> Iterator[tuple[Any, ...]]:
    """Group, path, similarity."""
    for number, (group, similarity) in enumerate(zip(found.groups, found.similarity, strict=True)):
        yield from ((number, name(int(i)), f"{value:.4f}") for i, value in zip(group, similarity, strict=True))


def outlier_rows(found: Outliers, name: Callable[[int], str]) -> Iterator[tuple[Any, ...]]:
    """Path, distance."""
    for position, distance in zip(found.positions_O.tolist(), found.distance_O.tolist(), strict=True):
        yield name(position), f"{distance:.4f}"
