"""PASCAL VOC 2007 classification: several labels an image; a network fine-tuned, trained from fc6 on, or frozen.

Protocols of Caron et al. 2018 (https://arxiv.org/abs/1807.05520, section 4.3) and, with --svm, Goyal et al. 2019.

    python eval_voc.py --pretrained runs/mine/checkpoint.pth.tar --vocdir VOCdevkit --split trainval --dump_path run
    python eval_voc.py --pretrained swav_800ep_pretrain.pth.tar --vocdir VOCdevkit --split trainval --svm

Trains on trainval and tests on test, or on train and val. The same command resumes.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))
import clusterssl.early  # noqa: F401

import torch

from clusterssl import config as cfg
from clusterssl import dist
from clusterssl.data.views import CentreCrop, RandomSquare, TenCrops
from clusterssl.dist import World
from clusterssl.evals import inputs, voc
from clusterssl.evals.average_precision import class_precisions, mean_precisions
from clusterssl.evals.steps import FREE, StepRun
from clusterssl.evals.svm import SvmOptions, svm_table
from clusterssl.evals.vocdevkit import Labelled, read_pair, voc_folder
from clusterssl.mirrors import MirrorOptions

logger = logging.getLogger("clusterssl.eval_voc")

_TEST_EPOCHS = range(10**6, 10**6 + 10)  # crops that no training step draws


@dataclass(frozen=True)
class Config:
    network: inputs.NetworkOptions = inputs.NetworkOptions()
    voc: voc.VocOptions = voc.VocOptions()
    svm: SvmOptions = SvmOptions()
    mirrors: MirrorOptions = MirrorOptions()
    launch: inputs.LaunchOptions = inputs.LaunchOptions()


class Protocol:
    """One network, the images to train and to test on."""

    def __init__(self, config: Config, world: World, network: inputs.Network, train: Labelled, test: Labelled) -> None:
        self.config, self.world, self.network, self.train, self.test = config, world, network, train, test
        self.loading: Any = {"workers": config.voc.data.usable_workers, "device": world.device, "std": network.std}
        self.size, self.resize = network.image_size, round(max(network.image_size) * 256 / 224)

    def trained(self) -> Iterator[dict[str, Any]]:
        """Train, then test."""
        options, network = self.config.voc, self.network
        net = voc.VocNet(network.backbone, len(self.train.classes), options.seed).to(self.world.device)
        parameters = net.trained(fc6_8=options.fc6_8, train_batchnorm=options.train_batchnorm)
        optimizer = torch.optim.SGD(parameters, lr=options.lr, momentum=0.9, weight_decay=options.wd)
        labels_NC = torch.from_numpy(self.train.labels_NC).to(self.world.device)
        cut = RandomSquare(self.size, (options.min_scale, options.max_scale), options.seed)

        def steps(start: int) -> Iterator[voc.VocStep]:
            return voc.training_steps(
                self.train.images, cut, start, options.nit, batch_size=options.batch_size, seed=options.seed,
                **self.loading,
            )  # fmt: skip

        def step(number: int, batch: voc.VocStep) -> torch.Tensor:
            optimizer.param_groups[0]["lr"] = options.lr * 0.5 ** (number // options.stepsize)
            return voc.train_step(net, parameters, optimizer, number, batch, labels_NC)

        run = StepRun("eval_voc", options.dump_path, self.world, self.config.mirrors.mirrors)
        facts = {
            "network": network.fingerprint, "image_size": list(self.size), "num_images": len(self.train.images),
            "classes": self.train.classes, "global_batch": options.batch_size * self.world.size,
        }  # fmt: skip
        run.open(cfg.plain(self.config), facts, FREE | {"nit", "eval_random_crops", "svm"})
        run.fit(net, optimizer, options.nit, steps, step, save_every=options.checkpoint_every)
        yield {"kind": "voc", "steps": options.nit, "fc6_8": options.fc6_8, **self.tested(net, cut)}

    def tested(self, net: voc.VocNet, cut: RandomSquare) -> dict[str, float]:
        """Mean average precisions on the test images."""
        random = self.config.voc.eval_random_crops
        views, epochs = (cut, tuple(_TEST_EPOCHS)) if random else (TenCrops(self.size, self.resize), (0,))
        scores_NC = voc.summed_outputs(
            net, self.test.images, len(self.test.classes), views, epochs, **self.loading
        ).numpy()  # fmt: skip
        for name, precision in zip(self.test.classes, class_precisions(self.test.labels_NC, scores_NC), strict=True):
            logger.info("%16s  %6.2f", name, 100 * precision)
        return mean_precisions(self.test.labels_NC, scores_NC)

    def svms(self) -> Iterator[dict[str, Any]]:
        """Linear machines on frozen features of centre crops, for every number of labels."""
        backbone: Any = self.network.backbone.to(self.world.device)
        cut = CentreCrop(self.size, self.resize)
        train_NF, test_NF = (
            voc.summed_outputs(backbone, split.images, backbone.feature_dim, cut, **self.loading).numpy()
            for split in (self.train, self.test)
        )  # fmt: skip
        labels = self.train.labels_NC, self.test.labels_NC
        for row in svm_table(train_NF, labels[0], test_NF, labels[1], self.config.svm, self.config.voc.seed):
            yield {"kind": "voc_svm", **row}


def main() -> None:
    config = cfg.parse(Config, cfg.translate(sys.argv[1:], {"model": "pretrained"}), description=__doc__)
    world = config.launch.join()
    options = config.voc
    train, test = read_pair(voc_folder(options.vocdir), options.split, options.data.val_split)
    network = inputs.open_network(config.network, data_path=options.vocdir, seed=options.seed)
    protocol = Protocol(config, world, network, train, test)
    for numbers in protocol.svms() if config.svm.svm else protocol.trained():
        told = ", ".join(f"{key} {value:.2f}" for key, value in numbers.items() if isinstance(value, float))
        shots = numbers.get("shots", 0)
        few = f", {shots} images a class, mean of {numbers['draws']} draws" if shots else ""
        logger.info("VOC2007 %s%s: %s", options.data.val_split, few, told)
        inputs.append_evaluation(options.dump_path, numbers.pop("kind"), numbers, network, config.network, options.data)
    dist.leave()


if __name__ == "__main__":
    cfg.entry(main)
