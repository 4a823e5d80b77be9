"""Unsupervised classification: a network's own clusters, or k-means of frozen features, compared with the classes.

Amrani et al. 2022 (Self-Classifier), section 4.1 and table 3; Asano et al. 2020 (SeLa), table 5.

Legend of suffixes: N images.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from clusterssl.config import require, require_numbers
from clusterssl.errors import UserError
from clusterssl.evals import kmeans
from clusterssl.evals.cache import Extraction
from clusterssl.evals.clustering import agreement, superclass_agreement
from clusterssl.evals.hierarchy import Hierarchy, open_hierarchy
from clusterssl.evals.setup import Clusters, Embedding, Setup
from clusterssl.evals.subsets import labelled
from clusterssl.models.network import Network
from clusterssl.report import Table

logger = logging.getLogger(__name__)

_ENOUGH = 100  # images a cluster, of which ImageNet's 10 % have 128


@dataclass(frozen=True)
class ClusterOptions:
    """Clusters."""

    clusters: Literal["auto", "heads", "kmeans"] = "auto"
    """heads: what the checkpoint's own head says; kmeans: of its frozen features; auto: heads where there are any"""
    cls_num: int = 0
    """which of several heads, from 0; -1: all, one after the other"""
    kk: int = 0
    """number of clusters of k-means; 0: as many as classes"""
    use_mlp: bool = False
    """k-means of features after the projection head; else of the backbone's"""
    label_subset: float = 0.0
    """share of the training images that k-means learns from, in percent of every class; 0: 10 (published) where that
    leaves 100 images a cluster, else 100"""
    label_list: str = ""
    """list of these images, as in eval_knn.py"""
    kmeans_starts: int = 10
    """independent starts of k-means, the best one counts"""
    kmeans_backend: Literal["sklearn", "torch"] = "sklearn"
    """sklearn is the published one; torch is faster on many images, all ranks and the GPU work on each start"""
    kmeans_cls: str = ""
    """.npy file of centres to use instead of fitting, e.g. the kmeans.npy of an earlier run"""
    superclass: tuple[str, ...] = ()
    """also compare with superclasses: WordNet levels 0 to 8, entity13, entity30, living17, nonliving26, or files of
    lines "class, tab, superclass" """
    batch_size: int = 256
    """images per rank and forward pass"""

    def __post_init__(self) -> None:
        require_numbers(self, "kmeans_starts", "batch_size", least=1)
        require(self.cls_num >= -1, f"--cls_num {self.cls_num}: heads are numbered from 0, -1 means all")
        require_numbers(self, "kk", least=0)
        share = self.label_subset
        require(0 <= share <= 100, f"--label_subset {share:g}: a share in percent lies between 0 and 100")
        by_kmeans = bool(self.kmeans_cls or self.kk or self.use_mlp or self.label_list)
        require(self.clusters != "heads" or not by_kmeans, "--clusters heads: --kk, --use_mlp, ... are for kmeans")


class Found(NamedTuple):
    """Clusters of the test images that could be read."""

    title: str
    """"head 0" or "k-means, 1000 of backbone features" """
    clusters_N: NDArray[np.int64]
    labels_N: NDArray[np.int64]
    positions_N: NDArray[np.int64]
    """in the dataset"""


def find_clusters(setup: Setup, options: ClusterOptions) -> Iterator[Found]:
    """Clusters of the test images: of one head, of every head, or by k-means. A collective.

    Raises:
        UserError: there is no such head, or k-means is told to do what it cannot.
    """
    network = _with_heads(setup, options)
    if network is None:
        yield _by_kmeans(setup, options)
        return
    number = _heads(network, setup)
    heads = range(number) if options.cls_num < 0 else [options.cls_num]
    for head in heads:
        if head >= number:
            raise UserError(f"--cls_num {head}: this network has heads 0 to {number - 1}; choose one of them")
        extraction = setup.extraction(Clusters(network, head), f"head {head}", options.batch_size)
        rows, labels, positions = extraction.of(setup.val, setup.data.val_split)
        yield Found(f"head {head}", rows[:, 0].long().numpy(), labels.numpy(), positions.numpy())


def _with_heads(setup: Setup, options: ClusterOptions) -> Network | None:
    """The network with its heads, or None where k-means is asked for or needed."""
    if options.clusters == "kmeans" or options.kmeans_cls or options.kk:
        return None
    try:
        network = setup.whole_network()
        number = _heads(network, setup)
    except UserError as error:
        if options.clusters == "heads":
            raise
        logger.info("%s", error)
        number = 0
    if number:
        return network
    if options.clusters == "heads":
        raise UserError(f"--clusters heads: {setup.flags.pretrained} has no head that gives clusters; use kmeans")
    logger.info("no head that gives clusters: k-means of frozen features")
    return None


@torch.no_grad()
def _heads(network: Network, setup: Setup) -> int:
    return len(network.scores([torch.zeros(1, 3, *setup.network.image_size, device=setup.world.device)]))


def _by_kmeans(setup: Setup, options: ClusterOptions) -> Found:
    part = "embedding" if options.use_mlp else "backbone"
    network = Embedding(setup.whole_network()) if options.use_mlp else None
    extraction = setup.extraction(network, part, options.batch_size)
    rows, labels, positions = extraction.of(setup.val, setup.data.val_split)
    if options.kmeans_cls:
        centres_KF = kmeans.load_centres(options.kmeans_cls, rows.shape[1])
    else:
        centres_KF = _fitted(setup, options, extraction)
    title = f"k-means, {len(centres_KF)} of {part} features"
    return Found(title, kmeans.nearest_centre(rows, centres_KF), labels.numpy(), positions.numpy())


def _fitted(setup: Setup, options: ClusterOptions, extraction: Extraction) -> torch.Tensor:
    """Centres of the training images' features; kept in the result folder."""
    k = options.kk or len(setup.train.classes)
    share = options.label_subset or (10.0 if len(setup.train) / 10 >= _ENOUGH * k else 100.0)
    whole = share == 100 and not options.label_list
    chosen = None if whole else labelled(setup.train, share, options.label_list, setup.seed)
    seen = extraction.of(setup.train, "train", chosen)
    logger.info("k-means: %d clusters of %d images, %d starts", k, len(seen.rows), options.kmeans_starts)
    centres_KF = kmeans.fit(
        seen.rows, k, seed=setup.seed, starts=options.kmeans_starts, backend=options.kmeans_backend,
        device=setup.world.device,
    )  # fmt: skip
    kmeans.save_centres(centres_KF, Path(setup.dump_path) / "kmeans.npy")
    return centres_KF


def open_hierarchies(setup: Setup, options: ClusterOptions) -> list[Hierarchy]:
    """The superclasses asked for; done first, so that a wrong name does not cost a pass over the images."""
    return [open_hierarchy(name, setup.train.classes) for name in options.superclass]


def records(found: Found, hierarchies: list[Hierarchy]) -> list[dict[str, Any]]:
    """Agreement with the classes, then with every kind of superclasses; percent.

    "accuracy" is that of Self-Classifier: "majority_accuracy" where there are more clusters than classes, else
    "hungarian_accuracy"; see `agreement` and `superclass_agreement`.
    """
    scores = agreement(found.clusters_N, found.labels_N)
    accuracy = scores.get("majority_accuracy", scores["hungarian_accuracy"])
    about = {"clusters": found.title, "clusters_used": len(np.unique(found.clusters_N))}
    classes = {"images": len(found.labels_N), "classes": len(np.unique(found.labels_N))}
    rows = [{**about, "superclass": "", **classes, "accuracy": accuracy, **scores}]
    for hierarchy in hierarchies:
        above_N = hierarchy.of_C[found.labels_N]
        if not (above_N >= 0).any():
            raise UserError(f"--superclass {hierarchy.title}: none of the test images has one; leave it out")
        inside = {"images": int((above_N >= 0).sum()), "classes": len(np.unique(above_N[above_N >= 0]))}
        rows.append({
            **about, "superclass": hierarchy.title, **inside,
            **superclass_agreement(found.clusters_N, found.labels_N, hierarchy.of_C),
        })  # fmt: skip
    return rows


def shown(found: Found, rows: list[dict[str, Any]], split: str) -> Table:
    """What `records` gives, for the screen."""
    names = {"accuracy": "accuracy", "hungarian_accuracy": "hungarian", "label_accuracy": "label"}
    names |= {name: name for name in ("nmi", "ami", "ari")}
    lines = tuple(
        (row["superclass"] or str(row["classes"]), *(f"{row[name]:.2f}" if name in row else "-" for name in names))
        for row in rows
    )
    about = rows[0]
    title = f"{found.title}: {about['clusters_used']} clusters hold the {about['images']} images of {split}, percent"
    more = "majority_accuracy" in about
    note = "more clusters than classes: those left over count as their most frequent class, under hungarian as wrong"
    return Table(title, ("classes", *names.values()), lines, note if more else "")
