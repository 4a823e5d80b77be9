"""A run's clusters on its own images, for its report: galleries, and maps of the features made of thumbnails.

Legend of suffixes: N images of the sample, F features.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from clusterssl.data import Source, eval_batches, open_source, resize_for
from clusterssl.errors import UserError
from clusterssl.evals import inputs
from clusterssl.labelling.clusters import Labels
from clusterssl.labelling.pages import Clusters, square
from clusterssl.labelling.reading import ReadingOptions, open_reader
from clusterssl.report import Gallery, Strip
from clusterssl.report.pictures import address_of
from clusterssl.report.records import read_json

logger = logging.getLogger(__name__)

MOST_BYTES, BYTES_OF_A_RUN = 4_700_000, 130_000
"""of a page, which stays below 5 MB, and of the curves and tables of a run in it; pictures get what is left"""
_MOST = 1000
_MAPPED = 400
_SHOWN, _CLUSTERS = 8, 6
_SHEET, _THUMBNAIL = 720, 24
_BY_CLASS = ("Purest clusters", "Most confused clusters", "")
_BY_CONFIDENCE = ("Surest clusters", "Most doubtful clusters", " By mean confidence, as these images have no classes.")


def run_galleries(folder: Path, device: torch.device | str = "cpu", seconds: float = math.inf) -> list[Gallery]:
    """The largest, smallest, purest and most confused clusters of up to 1,000 of a run's images, and two maps.

    Purest and most confused by the images' classes; where these are unknown the surest and most doubtful by confidence.
    Nothing where checkpoint or images are out of reach; a log line says so.

    Args:
        folder: run directory.
        device: where to compute.
        seconds: after which no further image is read.
    """
    config = read_json(folder / "run.json").get("config") or {}
    checkpoint = folder / "checkpoint.pth.tar"
    if "data_path" not in config or not checkpoint.is_file():
        logger.info("%s: no gallery, there is no checkpoint yet", folder)
        return []
    try:
        source = open_source(config["data_path"], subset_file=config.get("subset_file", ""), patience_s=0, cache="none")
        labels, features_NF = _read(checkpoint, source, torch.device(device), time.monotonic() + seconds)
    except UserError as error:
        logger.info("%s: no gallery (%s)", folder, error)
        return []
    places = {"PCA": _pca(features_NF), "t-SNE": _tsne(features_NF)}
    maps = tuple(_map(source, labels, places_N2, name) for name, places_N2 in places.items())
    found = _galleries(labels, source) if len(labels.clusters_N) else []
    found.append(
        Gallery("Maps of the features", maps, "Images that the network takes for alike are close.", True, choice=False)
    )
    return [replace(gallery, run=folder) for gallery in found]


def galleries_of(folders: Sequence[Path], most_bytes: int | None = None) -> list[Gallery]:
    """As `run_galleries` of several runs; what would make their page too large is left out, maps first."""
    kept: list[Gallery] = []
    most_bytes = MOST_BYTES - BYTES_OF_A_RUN * len(folders) if most_bytes is None else most_bytes
    for folder in folders:
        found, left = run_galleries(folder), most_bytes - weight(kept)
        clusters = [gallery for gallery in found if gallery.choice]
        chosen = next((part for part in (found, clusters) if weight(part) <= left), [])
        if len(chosen) < len(found):
            what = "maps" if chosen else "clusters and maps"
            logger.info("%s: no %s, the page would become too large", folder, what)
        kept += chosen
    return kept


def weight(galleries: Sequence[Gallery]) -> int:
    """Bytes of their pictures."""
    return sum(len(strip[2]) for gallery in galleries for strip in gallery.strips)


def _read(checkpoint: Path, source: Source, device: torch.device, end: float) -> tuple[Labels, NDArray[np.float32]]:
    """Clusters (none without a head) and unit features of images spread evenly over the dataset, until `end`."""
    options = ReadingOptions()
    reader, network = open_reader(inputs.NetworkOptions(pretrained=str(checkpoint)), options, device=device, seed=0)
    spread = np.unique(np.linspace(0, len(source) - 1, min(_MOST, len(source))).round().astype(np.int64))
    chosen = np.random.default_rng(0).permutation(spread)  # whatever part of it is read is spread evenly, too
    batches = eval_batches(
        source, chosen, image_size=network.image_size, resize=resize_for(network.image_size), batch_size=50,
        device=device, std=network.std,
    )  # fmt: skip
    said = []
    for batch in batches:
        said.append(reader(batch.images))
        if time.monotonic() > end:
            break
    chosen = chosen[: sum(len(part.features_BF) for part in said)]
    clusters_N4 = torch.cat([part.clusters_B4.cpu() for part in said]).numpy()
    features_NF = torch.cat([part.features_BF.cpu() for part in said]).numpy()
    if not clusters_N4.shape[1]:
        none = np.empty(0, dtype=np.int64)
        return Labels("", 0, chosen, none, none.astype(np.float32), none, none.astype(np.float32)), features_NF
    cluster, second = clusters_N4[:, 0].astype(np.int64), clusters_N4[:, 2].astype(np.int64)
    return Labels(
        "the network's own clusters", 0, chosen, cluster, clusters_N4[:, 1], second, clusters_N4[:, 3]
    ), features_NF


def _galleries(labels: Labels, source: Source) -> list[Gallery]:
    """Clusters by size, and by purity, or by confidence where classes are unknown."""
    clusters = Clusters(labels, source)
    pure = clusters.purity()
    quality, best, worst, why = (pure, *_BY_CLASS) if pure is not None else (clusters.confidence, *_BY_CONFIDENCE)
    by_size = np.argsort(-clusters.sizes, kind="stable")
    first, last = (np.lexsort((-clusters.sizes, sign * quality)) for sign in (-1, 1))  # of equals the largest
    note = f"Of {len(labels.positions_N)} images of the run, the most confident first."
    largest = float(clusters.sizes.max() / clusters.sizes.sum())
    parts = {
        "Largest clusters": (by_size, note), "Smallest clusters": (by_size[::-1], note),
        best: (first, note + why), worst: (last, note + why),
    }  # fmt: skip
    return [
        Gallery(
            title, tuple(clusters.strip(int(row), _SHOWN, pure) for row in order[:_CLUSTERS]), said, wide=True,
            largest=largest,
        )
        for title, (order, said) in parts.items()
    ]  # fmt: skip


def _pca(rows_NF: NDArray[np.float32]) -> NDArray[np.float64]:
    """The two directions of highest variance, [N, 2]."""
    centred = rows_NF[:: max(1, -(-len(rows_NF) // _MAPPED))].astype(np.float64)
    centred = centred - centred.mean(0)
    left, size, _ = np.linalg.svd(centred, full_matrices=False)
    found = left[:, :2] * size[:2]
    return np.pad(found, ((0, 0), (0, 2 - found.shape[1])))


def _tsne(rows_NF: NDArray[np.float32]) -> NDArray[np.float64]:
    """Neighbours side by side (van der Maaten and Hinton 2008), [N, 2]; PCA for fewer than ten images."""
    from sklearn.manifold import TSNE

    rows = rows_NF[:: max(1, -(-len(rows_NF) // _MAPPED))]
    if len(rows) < 10:
        return _pca(rows_NF)
    found = TSNE(init="pca", perplexity=min(30, (len(rows) - 1) / 3), random_state=0).fit_transform(rows)
    return np.asarray(found, dtype=np.float64)


def _map(source: Source, labels: Labels, places_N2: NDArray[np.float64], name: str) -> Strip:
    """Thumbnails where their features lie."""
    positions = labels.positions_N[:: max(1, -(-len(labels.positions_N) // _MAPPED))]
    low, high = places_N2.min(0), places_N2.max(0)
    corner_N2 = np.rint((places_N2 - low) / np.maximum(high - low, 1e-12) * (_SHEET - _THUMBNAIL)).astype(int)
    sheet = Image.new("RGBA", (_SHEET, _SHEET), (0, 0, 0, 0))
    for (left, top), position in zip(corner_N2.tolist(), positions.tolist(), strict=True):
        sheet.paste(Image.fromarray(square(source, position, _THUMBNAIL)), (left, _SHEET - _THUMBNAIL - top))
    address = address_of(sheet, photo=True)
    words = f"{len(positions)} images of the run where {name} puts their features"
    return Strip(f"{name}: {words}", words, address)
