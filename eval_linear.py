"""Linear evaluation of a frozen network: one linear layer trained by SGD on its features, tested after every epoch.

Caron et al. 2020, https://arxiv.org/abs/2006.09882, section 4.1; the published setting is 8 ranks x 32 images.

    python eval_linear.py --pretrained runs/mine/checkpoint.pth.tar --data_path /imagenet --dump_path runs/linear
    torchrun --nproc_per_node=8 eval_linear.py --pretrained swav_800ep_pretrain.pth.tar --data_path /imagenet

The same command resumes. checkpoints/best.pth.tar in the run directory is the classifier of the best epoch.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

import numpy as np
from torch import Tensor

from clusterssl import config as cfg
from clusterssl import dist
from clusterssl.data import Source
from clusterssl.dist import World
from clusterssl.evals import classifier as heads
from clusterssl.evals import inputs
from clusterssl.evals.features import augmented_steps, extract
from clusterssl.evals.linear import draw_labels
from clusterssl.evals.training import ClassifierRun, SgdOptions
from clusterssl.log import log_to_screen

logger = logging.getLogger("clusterssl.eval_linear")


@dataclass(frozen=True)
class ClassifierOptions:
    """Classifier."""

    global_pooling: bool = True
    """average over the whole map; false: over 6x6 windows, 8192 features for a ResNet-50 at 224 px"""
    use_bn: bool = False
    """BatchNorm before the classifier; of effect without global pooling only, as published"""
    labels_per_class: int = 0
    """train on that many random images of each class; 0: on all"""
    train_augmentation: Literal["auto", "rrc", "none"] = "auto"
    """rrc: random resized crop and flip through the network in every epoch (published); none: features computed once
    and kept in memory, many times faster; auto: none up to 64 px, else rrc"""


@dataclass(frozen=True)
class Config:
    network: inputs.NetworkOptions = inputs.NetworkOptions()
    data: inputs.DataOptions = inputs.DataOptions()
    classifier: ClassifierOptions = ClassifierOptions()
    optim: SgdOptions = SgdOptions()
    launch: inputs.LaunchOptions = inputs.LaunchOptions()
    dump_path: str = "."
    """run directory; the same command there resumes by itself"""
    seed: int = 31
    """of the classifier, the order, the crops and the choice of labels"""


class Protocol:
    """Frozen network, one linear layer, SGD with momentum, one learning rate per epoch."""

    def __init__(self, config: Config, world: World, network: inputs.Network, train: Source, val: Source) -> None:
        self.config, self.world, self.network, self.source, self.val_source = config, world, network, train, val
        options, each = config.classifier, config.classifier.labels_per_class
        self.chosen = draw_labels(train.labels, each, seed=config.seed) if each else np.arange(len(train))
        small = max(network.image_size) <= 64
        self.in_memory = options.train_augmentation == "none" or (options.train_augmentation == "auto" and small)
        self.pooled = heads.Pooled(network.backbone, global_pooling=options.global_pooling).to(world.device).eval()

    def facts(self) -> dict[str, Any]:
        """What a resumed run must find as it was, whatever the flags say."""
        return {
            "network": self.network.fingerprint, "image_size": list(self.network.image_size),
            "num_images": len(self.chosen), "num_classes": len(self.source.classes),
            "global_batch": self.config.optim.batch_size * self.world.size, "features_in_memory": self.in_memory,
        }  # fmt: skip

    def prepare(self) -> None:
        """Compute what stays the same in all epochs: test features, and training features unless crops are random."""
        optim = self.config.optim
        self.val = self.features(self.val_source, "validation", gather=False)
        self.train = self.features(self.source, "train", self.chosen) if self.in_memory else None
        held = [x.numel() * x.element_size() for pair in (self.val, self.train or ()) for x in pair]
        logger.info("memory: %.1f MiB of features on this rank", sum(held) / 2**20)
        logger.info(
            "%s; %d images, %d a step, lr %g (published: 256 a step with lr 0.3)",
            "features computed once, no augmentation" if self.in_memory else "random crops and flips in every epoch",
            len(self.chosen), optim.batch_size * self.world.size, optim.lr,
        )  # fmt: skip
        shape, classes, options = self.val[0].shape[1:], len(self.source.classes), self.config.classifier
        classifier = heads.LinearClassifier(shape, classes, use_bn=options.use_bn, seed=self.config.seed)
        self.classifier = classifier.to(self.world.device)
        self.optimizer = optim.optimizer(self.classifier)

    def features(
        self, source: Source, what: str, chosen: np.ndarray | None = None, *, gather: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Features and labels of centre crops: of all images (gather) or of this rank's share."""
        return extract(
            self.pooled, source, image_size=self.network.image_size, indices=chosen, gather=gather, what=what,
            workers=self.config.data.usable_workers, device=self.world.device,
        )  # fmt: skip

    def steps(self, epoch: int) -> Iterator[heads.Step]:
        """Training steps of an epoch; the last, incomplete one is kept."""
        batch_size, seed = self.config.optim.batch_size, self.config.seed
        if self.train is not None:
            return heads.steps_in_memory(*self.train, heads.epoch_order(len(self.train[0]), seed, epoch), batch_size)
        return augmented_steps(
            self.pooled, self.source, self.chosen, heads.epoch_order(len(self.chosen), seed, epoch),
            image_size=self.network.image_size, batch_size=batch_size, workers=self.config.data.usable_workers,
            device=self.world.device, seed=seed, epoch=epoch,
        )  # fmt: skip

    def epoch(self, epoch: int) -> dict[str, float]:
        """Train for one epoch, then test."""
        rate = self.config.optim.rate(epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss, train_top1, _ = heads.train_epoch(self.classifier, self.optimizer, self.steps(epoch), self.world.device)
        val_loss, top1, top5 = heads.evaluate(self.classifier, *self.val, self.world.device)
        return {"lr": rate, "loss": loss, "train_top1": train_top1, "val_loss": val_loss, "top1": top1, "top5": top5}


def main() -> None:
    config = cfg.parse(Config, description=__doc__)
    world = config.launch.join()
    log_to_screen(world)
    train, val = inputs.open_splits(config.data)
    network = inputs.open_network(config.network, data_path=config.data.data_path, seed=config.seed)
    protocol = Protocol(config, world, network, train, val)
    run = ClassifierRun("eval_linear", config.dump_path, world)
    run.open(cfg.plain(config), protocol.facts())
    protocol.prepare()
    best = run.fit(protocol.classifier, protocol.optimizer, config.optim.epochs, protocol.epoch, len(protocol.chosen))
    logger.info("linear on %s: top-1 %.2f, top-5 %.2f", config.data.val_split, best["top1"], best["top5"])
    inputs.append_evaluation(config.dump_path, "linear", best, network, config.network, config.data)
    dist.leave()


if __name__ == "__main__":
    cfg.entry(main)
