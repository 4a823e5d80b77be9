"""The linear evaluation: a frozen network, linear classifiers trained by SGD on its features, tested after each epoch.

Protocols of SwAV (Caron et al. 2020, section 4.1), DeepCluster (Caron et al. 2018, table 1), SeLa (Asano et al. 2020,
table 4) and Self-Classifier (Amrani et al. 2022, table 1); see `presets`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from clusterssl.config import require
from clusterssl.data import resize_for
from clusterssl.evals import classifier as heads
from clusterssl.evals.cache import HELD, Extraction
from clusterssl.evals.features import augmented_steps
from clusterssl.evals.layers import LayerFeatures, Probes, track_batches
from clusterssl.evals.linear import draw_labels
from clusterssl.evals.setup import Setup
from clusterssl.evals.training import ClassifierRun, SgdOptions

logger = logging.getLogger(__name__)

_IMAGES_AT_A_TIME = 1024


@dataclass(frozen=True)
class ClassifierOptions:
    """Classifier."""

    preset: Literal["swav", "deepcluster", "sela", "selfclassifier"] = "swav"
    """published protocol whose values stand for all flags that are not given; sela differs for AlexNet and ResNets"""
    global_pooling: bool = True
    """average over the whole map; false: over 6x6 windows, 8192 features for a ResNet-50 at 224 px"""
    use_bn: bool = False
    """BatchNorm before the classifier; of effect without global pooling only, as published"""
    layers: tuple[str, ...] = ()
    """instead of one classifier at the end, one on each of these: conv1 ... conv5, layer1 ... layer4; all are trained
    in one pass"""
    layer_pooling: Literal["avg", "max"] = "avg"
    """how maps of --layers are made small: about 9,600 features each"""
    layer_bn: bool = False
    """BatchNorm without parameters before each classifier of --layers"""
    init: Literal["normal", "xavier", "default"] = "normal"
    """first weights: normal of deviation 0.01, uniform by fan-in and fan-out, or the framework's"""
    tencrops: bool = False
    """test on ten crops of each image instead of the centre"""
    average: Literal["softmax", "logits"] = "softmax"
    """what is averaged over the ten crops"""
    test_from: int = 1
    """first epoch after which is tested; the last one always is"""
    frozen_bn: Literal["running", "batch"] = "running"
    """BatchNorm of the frozen network: its running statistics, or those of each training batch, which also move the
    running ones (published for SeLa's ResNets)"""
    labels_per_class: int = 0
    """train on that many random images of each class; 0: on all"""
    train_augmentation: Literal["auto", "rrc", "crop", "none"] = "auto"
    """rrc: random resized crop and flip through the network in every epoch (published); crop: random window of the
    resized image and flip (DeepCluster); none: features computed once and kept, many times faster; auto: none up to
    64 px, else rrc"""

    def __post_init__(self) -> None:
        require(self.test_from > 0, f"--test_from {self.test_from}: epochs are numbered from 1")
        require(not (self.layers and not self.global_pooling), "--layers --global_pooling false: one or the other")
        once = self.train_augmentation == "none" and self.frozen_bn == "batch"
        require(not once, "--frozen_bn batch: needs training batches, --train_augmentation none has none")


_PRESETS = {
    "swav": "",
    "deepcluster": """
        --layers conv1 conv2 conv3 conv4 conv5 --init default --train_augmentation crop --epochs 90 --batch_size 256
        --lr 0.01 --wd 1e-4 --scheduler_type inverse_sqrt
    """,
    "sela": """
        --init default --frozen_bn batch --train_augmentation rrc --epochs 146 --batch_size 1024 --lr 0.1 --wd 0
        --scheduler_type step --decay_epochs 85 128
    """,
    "sela alexnet": """
        --layers conv1 conv2 conv3 conv4 conv5 --layer_pooling max --layer_bn --init xavier --train_augmentation rrc
        --tencrops --average logits --test_from 27 --epochs 36 --batch_size 192 --lr 0.01 --wd 1e-5
        --scheduler_type step --decay_epochs 10 20 30
    """,
    "selfclassifier": "--lars --lr 0.8 --wd 0 --batch_size 256 --train_augmentation rrc",
}


def presets(name: str, arch: str) -> list[str]:
    """The words of a published protocol, to stand before those of the command line; our defaults are SwAV's.

    Args:
        name: of the protocol.
        arch: of the network; SeLa has a protocol for AlexNet and another one for ResNets.
    """
    return _PRESETS.get(f"{name} {'alexnet' if 'alexnet' in arch else ''}", _PRESETS[name]).split()


class Probing:
    """Frozen network, linear classifiers, SGD with momentum.

    Args:
        setup: network and images.
        options: of the classifiers.
        optim: of their training.
    """

    def __init__(self, setup: Setup, options: ClassifierOptions, optim: SgdOptions) -> None:
        self.setup, self.options, self.optim = setup, options, optim
        network, each = setup.network, options.labels_per_class
        labels = setup.train.labels
        self.chosen = draw_labels(labels, each, seed=setup.seed) if each else np.arange(len(labels))
        small = max(network.image_size) <= 64
        how = options.train_augmentation
        self.in_memory = how == "none" or (how == "auto" and small and options.frozen_bn == "running")
        self.square = resize_for(network.image_size) if how == "crop" else 0
        self.norms = track_batches(network.backbone) if options.frozen_bn == "batch" else []
        self.features: nn.Module = self._features().to(setup.world.device).eval()

    def _features(self) -> LayerFeatures | heads.Pooled:
        network, options = self.setup.network, self.options
        if options.layers:
            return LayerFeatures(
                network.backbone, options.layers, pooling=options.layer_pooling, image_size=network.image_size
            )
        return heads.Pooled(network.backbone, global_pooling=options.global_pooling)

    def facts(self) -> dict[str, Any]:
        """What a resumed run must find as it was, whatever the flags say."""
        return {
            "network": self.setup.network.fingerprint, "image_size": list(self.setup.network.image_size),
            "num_images": len(self.chosen), "num_classes": len(self.setup.train.classes),
            "global_batch": self.optim.batch_size * self.setup.world.size, "features_in_memory": self.in_memory,
            "square": self.square,
        }  # fmt: skip

    def prepare(self) -> None:
        """Compute what stays the same in all epochs: test features, and training features unless crops are random."""
        data, device = self.setup.data, self.setup.world.device
        tested = self._extraction(self.options.tencrops)
        share = -(-len(self.setup.val) // self.setup.world.size)
        streamed = self.norms or (not tested.folder and tested.size(share) > HELD)
        self.val = None if streamed else tested.own(self.setup.val, data.val_split)
        train = self._extraction().of(self.setup.train, "train", self._part()) if self.in_memory else None
        self.train = None if train is None else (train.rows, train.labels)
        held = [x.numel() * x.element_size() for pair in (self.val, self.train) if pair for x in pair]
        logger.info("features: %.1f MiB on this rank", sum(held) / 2**20)
        published = " (published: 256 a step with lr 0.3)" if self.options.preset == "swav" else ""
        logger.info(
            "%s; %d images, %d a step, lr %g%s",
            "features computed once, no augmentation" if self.in_memory else "random crops and flips in every epoch",
            len(self.chosen), self.optim.batch_size * self.setup.world.size, self.optim.lr, published,
        )  # fmt: skip
        self.classifier = self._classifier().to(device)
        if self.norms:  # their statistics move, so they belong to the checkpoint
            self.classifier.frozen = nn.ModuleList(self.norms)
        self.optimizer = self.optim.optimizer(self.classifier)

    def _part(self) -> np.ndarray | None:
        return self.chosen if self.options.labels_per_class else None

    def _extraction(self, ten_crops: bool = False) -> Extraction:
        """Of the bare backbone where that is all there is, so that other evaluations share its kept features."""
        options = self.options
        if options.layers:
            part = " ".join([*options.layers, options.layer_pooling])
        else:
            part = "backbone" if options.global_pooling else "windows"
        extraction = self.setup.extraction(
            None if part == "backbone" else self.features, part, ten_crops=ten_crops
        )  # fmt: skip
        return replace(extraction, folder="", spill="") if self.norms else extraction

    def _classifier(self) -> nn.Module:
        classes, seed, options = len(self.setup.train.classes), self.setup.seed, self.options
        if isinstance(self.features, LayerFeatures):
            return Probes(
                self.features.shapes, classes, batch_norm=options.layer_bn, init=options.init, seed=seed
            )  # fmt: skip
        with torch.no_grad():
            like = torch.zeros(1, 3, *self.setup.network.image_size, device=self.setup.world.device)
            shape = self.features(like).shape[1:]
        return heads.LinearClassifier(shape, classes, use_bn=options.use_bn, init=options.init, seed=seed)

    def steps(self, epoch: int) -> Iterator[heads.Step]:
        """Training steps of an epoch; the last, incomplete one is kept."""
        batch_size = self.optim.batch_size
        order = heads.epoch_order(len(self.chosen if self.train is None else self.train[0]), self.setup.seed, epoch)
        if self.train is not None:
            return heads.steps_in_memory(*self.train, order, batch_size)
        return augmented_steps(
            self.features, self.setup.train, self.chosen, order, image_size=self.setup.network.image_size,
            batch_size=batch_size, workers=self.setup.data.usable_workers, device=self.setup.world.device,
            seed=self.setup.seed, epoch=epoch, std=self.setup.network.std, square=self.square,
        )  # fmt: skip

    def epoch(self, epoch: int) -> dict[str, Any]:
        """Train for one epoch, then test, unless it is too early for that."""
        per_epoch = -(-len(self.chosen) // (self.optim.batch_size * self.setup.world.size))
        for norm in self.norms:
            norm.train()
        trained = heads.train_probes(
            self.classifier, self.optimizer, self.steps(epoch), self.setup.world.device,
            self._set_rate(epoch, per_epoch),
        )  # fmt: skip
        for norm in self.norms:
            norm.eval()
        rate, first = self.optim.rate(epoch, epoch * per_epoch), trained[0]
        numbers = {"lr": rate, "loss": first.loss, "train_top1": first.top1}
        if epoch + 1 < min(self.options.test_from, self.optim.epochs):
            return {**numbers, "val_loss": None, "top1": 0.0, "top5": 0.0}
        tested = heads.evaluate_probes(
            self.classifier, self._test_batches(), self.setup.world.device,
            self.options.average if self.options.tencrops else "",
        )  # fmt: skip
        best = max(tested, key=lambda scores: scores.top1)
        layers = {name: scores._asdict() for name, scores in zip(self.options.layers, tested, strict=False)}
        numbers |= {"val_loss": best.loss, "top1": best.top1, "top5": best.top5}
        return {**numbers, "layers": layers} if layers else numbers

    def _set_rate(self, epoch: int, per_epoch: int) -> Callable[[int], None]:
        def before_step(number: int) -> None:
            for group in self.optimizer.param_groups:
                group["lr"] = self.optim.rate(epoch, epoch * per_epoch + number)

        return before_step

    def _test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Features and labels of this rank's test images; computed anew where they are too many or ever others."""
        if self.val is None:
            yield from self._extraction(self.options.tencrops).stream(self.setup.val, self.setup.data.val_split)
            return
        rows, labels = self.val
        size = _IMAGES_AT_A_TIME // (10 if self.options.tencrops else 1)
        yield from zip(rows.split(size), labels.split(size), strict=True)


def linear(
    setup: Setup, options: ClassifierOptions, optim: SgdOptions, flags: dict[str, Any], dump_path: str | None = None
) -> list[dict[str, Any]]:
    """Train and test in the run directory; the same call resumes. A collective.

    Returns:
        Numbers of the best epoch; with layers, one record for each layer of its own best epoch.

    Raises:
        UserError: see `Setup`, or the directory holds another run.
        Stopped: a signal asked for it.
    """
    probing = Probing(setup, options, optim)
    run = ClassifierRun("eval_linear", dump_path or setup.dump_path, setup.world, setup.mirrors)
    run.open(flags, probing.facts())
    probing.prepare()
    best = run.fit(probing.classifier, probing.optimizer, optim.epochs, probing.epoch, len(probing.chosen))
    shared = {"preset": options.preset, "tencrops": options.tencrops}
    if not options.layers:
        return [{**best, **shared}]
    return [{"layer": layer, **run.best_layers[layer], **shared} for layer in options.layers]
