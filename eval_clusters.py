"""Unsupervised classification: clusters of a frozen network compared with the classes, no label used to find them.

A network with clusters of its own (SwAV's prototypes, DeepCluster's and SeLa's heads, Self-Classifier's classifiers)
is taken at its word; for any other checkpoint k-means of its features makes them. NMI, AMI, ARI, and accuracy after
naming clusters by classes as Self-Classifier (Amrani et al. 2022) and SeLa (Asano et al. 2020) do.

    python eval_clusters.py --pretrained runs/mine/checkpoint.pth.tar --data_path /imagenet --dump_path runs/mine
    python eval_clusters.py --pretrained sc_800ep.pth.tar --data_path /imagenet --superclass 2 3 4 entity13 living17
    torchrun --nproc_per_node=8 eval_clusters.py --pretrained moco_v2_800ep.pth.tar --data_path /imagenet --kk 1000
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
from clusterssl.evals.cluster_pages import PictureOptions, write_pages
from clusterssl.evals.clusters import ClusterOptions, find_clusters, open_hierarchies, records, shown
from clusterssl.evals.setup import open_setup

logger = logging.getLogger("clusterssl.eval_clusters")


@dataclass(frozen=True)
class Config:
    network: inputs.NetworkOptions = inputs.NetworkOptions()
    data: inputs.DataOptions = inputs.DataOptions()
    clusters: ClusterOptions = ClusterOptions()
    pictures: PictureOptions = PictureOptions()
    cache: CacheOptions = CacheOptions()
    launch: inputs.LaunchOptions = inputs.LaunchOptions()
    dump_path: str = "."
    """folder of evaluations.jsonl, the pictures, the page and the k-means centres"""
    seed: int = 31
    """of k-means, of its images and of the images shown; of the random weights when there is no --pretrained"""


def main() -> None:
    config = cfg.parse(Config, description=__doc__)
    setup = open_setup(config, config.network, config.cache)
    hierarchies = open_hierarchies(setup, config.clusters)
    for found in find_clusters(setup, config.clusters):
        rows = records(found, hierarchies)
        logger.info("%s", shown(found, rows, config.data.val_split).text())
        for row in rows:
            setup.record("clusters", row)
        if setup.world.is_main:
            for path in write_pages(found, setup.val, rows, config.pictures, Path(config.dump_path), config.seed):
                logger.info("written: %s", path)
    dist.leave()


if __name__ == "__main__":
    cfg.entry(main)
