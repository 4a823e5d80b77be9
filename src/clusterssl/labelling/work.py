"""Labelling a folder from beginning to end: what assign.py does, in order."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clusterssl.config import require, require_numbers
from clusterssl.data import Source, open_source
from clusterssl.dist import World
from clusterssl.errors import UserError
from clusterssl.evals import inputs
from clusterssl.files import atomic_write
from clusterssl.labelling import clusters as grouping
from clusterssl.labelling import near, neighbourhood, pages, tables
from clusterssl.labelling.clusters import Labels
from clusterssl.labelling.neighbourhood import Duplicates, NeighbourOptions, Outliers
from clusterssl.labelling.pages import PageOptions
from clusterssl.labelling.pseudo import export_labels
from clusterssl.labelling.reading import Reader, ReadingOptions, open_reader
from clusterssl.labelling.scan import Scan, facts_of
from clusterssl.log import counted

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FolderOptions:
    """Images and results."""

    images: str = ""
    """images to label: a folder (nested or not), a list of files, or whatever else --data_path of a training takes"""
    out: str = ""
    """folder of the results; where it holds an unfinished labelling of the same images, that one goes on"""
    k: int = 0
    """number of clusters, by k-means of the features; 0: the network's own clusters"""
    labels: bool = False
    """instead: write the labels that the run --pretrained gave its own training images to the CSV file --out"""
    links: bool = False
    """also make a folder of links to its images for every cluster"""
    workers: int = 10
    """loader processes; at most the number of cores is used, 0 loads in this process"""

    def __post_init__(self) -> None:
        require_numbers(self, "k", "workers", least=0)


@dataclass(frozen=True)
class Options:
    """All that is asked for."""

    folder: FolderOptions = FolderOptions()
    network: inputs.NetworkOptions = inputs.NetworkOptions()
    reading: ReadingOptions = ReadingOptions()
    neighbours: NeighbourOptions = NeighbourOptions()
    page: PageOptions = PageOptions()
    seed: int = 31
    """of k-means"""


def label_folder(options: Options, world: World) -> None:
    """Label all images of a folder and write the results.

    Raises:
        UserError: bad flags, images, checkpoint or result folder, in one line.
    """
    folder = options.folder
    if folder.labels:
        _export(options)
        return
    inputs.require_alone(world, "assign.py")
    require(bool(options.network.pretrained), "--pretrained: name the checkpoint, or the directory of the run")
    require(bool(folder.images), "--images: name the folder of images to label")
    require(bool(folder.out), "--out: name the folder of the results")
    source, out = open_source(folder.images), Path(folder.out)
    if folder.links:
        tables.check_links(source)
    asked = near.pictures(options.neighbours.near)
    _check_out(out, folder.images)
    reader, network = open_reader(options.network, options.reading, device=world.device, seed=options.seed)
    k = _number(folder.k, reader, len(source))
    scan = Scan(out / "features", facts_of(reader, source, network, options.reading))
    workers = inputs.DataOptions(data_path=folder.images, workers=folder.workers).usable_workers
    if scan.done < scan.images:
        scan.run(reader, source, network, options.reading, workers)
    labels = grouping.by_kmeans(scan, k, seed=options.seed, device=world.device) if k else grouping.of_head(scan)
    write_results(options, out, scan, labels, source, world.device)
    if asked is not None:
        near.write_near(out, scan, source, asked, near.read(reader, asked, network), options.neighbours.near_count)


def _export(options: Options) -> None:
    require(bool(options.network.pretrained), "--pretrained: name the directory of the run whose labels are wanted")
    require(bool(options.folder.out), "--out: name the CSV file")
    require(not options.folder.images, "--labels: are those of the run's own images; leave --images out")
    images, heads = export_labels(Path(options.network.pretrained), Path(options.folder.out))
    logger.info("written: %s, labels of %d images by %d heads", options.folder.out, images, heads)


def _check_out(out: Path, images: str) -> None:
    """Refuse a result folder that is something else, or that the next labelling would take for images."""
    inside = Path(images).expanduser()
    if inside.is_dir() and inside.resolve() in (out.resolve(), *out.resolve().parents):
        raise UserError(f"--out {out}: lies inside --images, whose pictures would grow by its own; name another")
    inputs.check_writable(out, "--out")
    if out.exists() and any(out.iterdir()) and not (out / "features").is_dir():
        raise UserError(f"--out {out}: holds other files and no labelling; name a new folder")


def _number(k: int, reader: Reader, images: int) -> int:
    """Clusters of k-means; 0 where the network has its own."""
    if k > images:
        raise UserError(f"--k {k}: there are only {images} images; ask for fewer clusters")
    if k or reader.head is not None:
        return k
    k = grouping.default_k(images)
    logger.info("no head that gives clusters: k-means of the features into %d clusters (--k says another number)", k)
    return k


def write_results(
    options: Options, out: Path, scan: Scan, labels: Labels, source: Source, device: torch.device
) -> None:  # fmt: skip
    """Everything but nearest images."""
    seen = pages.Clusters(labels, source)
    tables.write_csv(out / "labels.csv", tables.COLUMNS, tables.label_rows(labels, source))
    tables.write_csv(out / "clusters.csv", ("cluster", "images", "confidence"), _cluster_rows(seen))
    if not tables.write_parquet(out / "labels.parquet", labels, source):
        logger.info("no labels.parquet: pyarrow is not installed (pip install pyarrow)")
    if scan.bad:
        tables.write_csv(out / "unreadable.csv", ("path",), ([source.name(i)] for i in scan.bad))
    if options.folder.links:
        logger.info("%d links in %s", tables.write_links(out / "clusters", labels, source), out / "clusters")
    copies, odd = _look_around(options, out, scan, source, device)
    scores, compared = pages.accuracy_in_words(labels, source)
    lead = _lead(labels, seen, scan) + compared
    name = Path(options.folder.images).name or options.folder.images
    pages.write_clusters_page(
        out / "clusters.html", seen, options.page, title=f"{name}: {labels.title}", lead=lead, copies=copies, odd=odd
    )
    about = {
        "clusters": labels.title, "clusters_used": len(seen.ids), "images": len(labels.positions_N),
        "unreadable": len(scan.bad), "pretrained": options.network.pretrained, "data_path": options.folder.images,
        "features": scan.facts["features"], "temperature": scan.facts["temperature"], "seed": options.seed,
        "duplicate_groups": None if copies is None else len(copies.groups),
        "outliers": None if odd is None else len(odd.positions_O), **scores,
    }  # fmt: skip
    atomic_write(out / "assign.json", lambda file: file.write((json.dumps(about, indent=1) + "\n").encode()))
    logger.info("%s", lead)
    if copies is not None and odd is not None:
        groups, alone = counted(len(copies.groups), "group"), counted(len(odd.positions_O), "image")
        logger.info("duplicates.csv: %s; outliers.csv: %s", groups, alone)
    for path in ("labels.csv", "clusters.html"):
        logger.info("written: %s", out / path)


def _cluster_rows(seen: pages.Clusters) -> Iterator[tuple[Any, ...]]:
    for cluster, images, confidence in zip(seen.ids.tolist(), seen.sizes.tolist(), seen.confidence, strict=True):
        yield cluster, images, f"{confidence:.6f}"


def _lead(labels: Labels, seen: pages.Clusters, scan: Scan) -> str:
    unreadable = f", {len(scan.bad)} more could not be read" if scan.bad else ""
    return (
        f"{labels.title}: {counted(len(labels.positions_N), 'image')} in {counted(len(seen.ids), 'cluster')} of "
        f"{seen.sizes.min()} to {seen.sizes.max()}{unreadable}."
    )


def _look_around(
    options: Options, out: Path, scan: Scan, source: Source, device: torch.device
) -> tuple[Duplicates | None, Outliers | None]:
    wanted = options.neighbours
    if not wanted.neighbours:
        return None, None
    cosine_NE, index_NE = neighbourhood.neighbours_of_all(scan, wanted.neighbours, seed=options.seed, device=device)
    if not cosine_NE.shape[1]:
        return None, None
    copies = neighbourhood.duplicates(scan, index_NE, wanted.duplicate_similarity)
    odd = neighbourhood.outliers(scan, cosine_NE, wanted.outlier_spread)
    tables.write_csv(
        out / "duplicates.csv", ("group", "path", "similarity"), tables.duplicate_rows(copies, source.name)
    )
    tables.write_csv(out / "outliers.csv", ("path", "distance"), tables.outlier_rows(odd, source.name))
    return copies, odd
