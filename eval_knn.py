"""Nearest-neighbour evaluation of a frozen network: no training, one number for each k.

Protocol of Wu et al. 2018, section 3.4: centre crops, features of unit length, each of the k nearest training images
votes with weight exp(cosine similarity / temperature).

    python eval_knn.py --pretrained runs/mine/checkpoint.pth.tar --data_path /imagenet
    torchrun --nproc_per_node=8 eval_knn.py --pretrained swav_800ep_pretrain.pth.tar --data_path /imagenet
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from torch import Tensor

from clusterssl import config as cfg
from clusterssl import dist
from clusterssl.data import Source
from clusterssl.dist import World
from clusterssl.evals import inputs
from clusterssl.evals.features import extract
from clusterssl.evals.knn import check_flags, knn_accuracy, memory_mib
from clusterssl.log import log_to_screen

logger = logging.getLogger("clusterssl.eval_knn")


@dataclass(frozen=True)
class KnnOptions:
    """Neighbours."""

    nb_knn: tuple[int, ...] = (10, 20, 100, 200)
    """numbers of neighbours k"""
    temperature: float = 0.1
    """of the votes' weights"""
    batch_size: int = 256
    """images per rank and forward pass"""
    dump_path: str = "."
    """folder where the result is appended to evaluations.jsonl"""
    seed: int = 31
    """of the random weights, when there is no --pretrained"""

    def __post_init__(self) -> None:
        problem = check_flags(self.nb_knn, self.temperature)
        cfg.require(not problem, problem)
        cfg.require(self.batch_size > 0, f"--batch_size {self.batch_size}: must be at least 1")


@dataclass(frozen=True)
class Config:
    network: inputs.NetworkOptions = inputs.NetworkOptions()
    data: inputs.DataOptions = inputs.DataOptions()
    knn: KnnOptions = KnnOptions()
    launch: inputs.LaunchOptions = inputs.LaunchOptions()


def features_of(
    source: Source, network: inputs.Network, config: Config, world: World, what: str
) -> tuple[Tensor, Tensor]:
    """Features of all images on every rank, and their labels."""
    return extract(
        network.backbone, source, image_size=network.image_size, batch_size=config.knn.batch_size,
        workers=config.data.usable_workers, device=world.device, what=what,
    )  # fmt: skip


def neighbours(
    config: Config, world: World, train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor]
) -> dict[int, tuple[float, float]]:
    """Accuracies per k."""
    options = config.knn
    held = sum(x.numel() * x.element_size() for pair in (train, val) for x in pair) / 2**20
    more = memory_mib(len(train[0]), len(val[0]), max(options.nb_knn), feature_dim=train[0].shape[1])
    logger.info("memory: features %.1f MiB on every rank, the search at most about %.1f MiB more", held, more)
    return knn_accuracy(*train, *val, ks=options.nb_knn, temperature=options.temperature, device=world.device)


def report(config: Config, network: inputs.Network, table: dict[int, tuple[float, float]]) -> None:
    """Show the table and append it to evaluations.jsonl."""
    data, options = config.data, config.knn
    logger.info("k-NN on %s of %s, temperature %g", data.val_split, data.data_path, options.temperature)
    logger.info("     k   top-1   top-5")
    for k, (top1, top5) in table.items():
        logger.info("%6d  %6.2f  %6.2f", k, top1, top5)
        numbers = {"k": k, "top1": top1, "top5": top5, "temperature": options.temperature}
        inputs.append_evaluation(options.dump_path, "knn", numbers, network, config.network, data)


def main() -> None:
    config = cfg.parse(Config, description=__doc__)
    world = config.launch.join()
    log_to_screen(world)
    train, val = inputs.open_splits(config.data)
    network = inputs.open_network(config.network, data_path=config.data.data_path, seed=config.knn.seed)
    train_features = features_of(train, network, config, world, "train")
    val_features = features_of(val, network, config, world, config.data.val_split)
    report(config, network, neighbours(config, world, train_features, val_features))
    dist.leave()


if __name__ == "__main__":
    cfg.entry(main)
