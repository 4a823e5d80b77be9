"""The nearest-neighbour protocol: which features and labels, for which numbers of neighbours.

Wu et al. 2018, section 3.4; with few labels and after the head as in Amrani et al. 2022, table 4.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from clusterssl.config import require, require_numbers
from clusterssl.evals.keeping import Features
from clusterssl.evals.knn import check_flags, knn_accuracy
from clusterssl.evals.search import memory_mib
from clusterssl.evals.setup import Embedding, Setup
from clusterssl.evals.subsets import LabelOptions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KnnOptions:
    """Neighbours."""

    nb_knn: tuple[int, ...] = (10, 20, 100, 200)
    """numbers of neighbours k"""
    temperature: float = 0.1
    """of the votes' weights"""
    use_mlp: bool = False
    """features after the projection head; else those of the backbone"""
    batch_size: int = 256
    """images per rank and forward pass"""

    def __post_init__(self) -> None:
        problem = check_flags(self.nb_knn, self.temperature)
        require(not problem, problem)
        require_numbers(self, "batch_size", least=1)


def nearest_neighbours(setup: Setup, options: KnnOptions, labels: LabelOptions) -> list[dict[str, Any]]:
    """Accuracies in percent, one record per k. A collective.

    Raises:
        UserError: no head to take features after, or a list of labels that does not fit.
    """
    network, part = (Embedding(setup.whole_network()), "embedding") if options.use_mlp else (None, "backbone")
    extraction = setup.extraction(network, part, options.batch_size)
    chosen = labels.choose(setup.train, setup.seed)
    train = extraction.of(setup.train, "train", chosen)
    val = extraction.of(setup.val, setup.data.val_split)
    _tell_memory(train, val, max(options.nb_knn))
    table = knn_accuracy(
        train.rows, train.labels, val.rows, val.labels, ks=options.nb_knn, temperature=options.temperature,
        device=setup.world.device,
    )  # fmt: skip
    shared = {"temperature": options.temperature, "features": part, "labelled_images": len(train.rows)}
    if chosen is not None:
        shared |= {"label_subset": labels.label_subset, "label_list": labels.label_list, "seed": setup.seed}
    return [{"k": k, "top1": top1, "top5": top5, **shared} for k, (top1, top5) in table.items()]


def _tell_memory(train: Features, val: Features, largest_k: int) -> None:
    held = sum(x.numel() * x.element_size() for features in (train, val) for x in features) / 2**20
    more = memory_mib(len(train.rows), len(val.rows), largest_k, feature_dim=train.rows.shape[1])
    logger.info("memory: features %.1f MiB on every rank, the search at most about %.1f MiB more", held, more)
