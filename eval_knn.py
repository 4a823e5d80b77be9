"""Nearest-neighbour evaluation of a frozen network: no training, one number for each k.

Protocol of Wu et al. 2018, section 3.4: centre crops, features of unit length, each of the k nearest training images
votes with weight exp(cosine similarity / temperature).

    python eval_knn.py --pretrained runs/mine/checkpoint.pth.tar --data_path /imagenet
    torchrun --nproc_per_node=8 eval_knn.py --pretrained swav_800ep_pretrain.pth.tar --data_path /imagenet
    python eval_knn.py --pretrained sc_800ep.pth.tar --data_path /imagenet --use_mlp --label_subset 10
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from clusterssl import config as cfg
from clusterssl import dist
from clusterssl.evals import inputs
from clusterssl.evals.cache import CacheOptions
from clusterssl.evals.neighbours import KnnOptions, nearest_neighbours
from clusterssl.evals.setup import open_setup
from clusterssl.evals.subsets import LabelOptions

logger = logging.getLogger("clusterssl.eval_knn")


@dataclass(frozen=True)
class Config:
    network: inputs.NetworkOptions = inputs.NetworkOptions()
    data: inputs.DataOptions = inputs.DataOptions()
    knn: KnnOptions = KnnOptions()
    labels: LabelOptions = LabelOptions()
    cache: CacheOptions = CacheOptions()
    launch: inputs.LaunchOptions = inputs.LaunchOptions()
    dump_path: str = "."
    """folder where the result is appended to evaluations.jsonl"""
    seed: int = 31
    """of the draw of labels, and of the random weights when there is no --pretrained"""


def main() -> None:
    config = cfg.parse(Config, description=__doc__)
    setup = open_setup(config, config.network, config.cache)
    records = nearest_neighbours(setup, config.knn, config.labels)
    logger.info(
        "k-NN on %s of %s, temperature %g, %d labelled images",
        config.data.val_split, config.data.data_path, config.knn.temperature, records[0]["labelled_images"],
    )  # fmt: skip
    logger.info("     k   top-1   top-5")
    for record in records:
        logger.info("%6d  %6.2f  %6.2f", record["k"], record["top1"], record["top5"])
    for record in records:
        setup.record("knn", record)
    dist.leave()


if __name__ == "__main__":
    cfg.entry(main)
