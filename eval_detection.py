"""Object detection: Faster R-CNN, Mask R-CNN or RetinaNet on a pretrained ResNet, on PASCAL VOC 07+12 or COCO.

Protocol of He et al. 2020 (MoCo, section 4.2): all layers trained, BatchNorm over all ranks also in the new layers.

    torchrun --nproc_per_node=8 eval_detection.py --pretrained swav_800ep_pretrain.pth.tar --data_path VOCdevkit
    torchrun --nproc_per_node=8 eval_detection.py --pretrained runs/mine.pth.tar --data_path coco --detector mask_rcnn

The same command resumes, to the bit on as many ranks; testing gives the same number on any. Needs torchmetrics and
faster-coco-eval (pip install clusterssl[detection]).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))
import clusterssl.early  # noqa: F401

import torch

from clusterssl import config as cfg
from clusterssl import dist
from clusterssl.batchnorm import synchronise
from clusterssl.dist import World
from clusterssl.evals import detection, detectors, inputs
from clusterssl.evals.detection_data import DetectionSet, open_sets
from clusterssl.evals.steps import StepRun
from clusterssl.mirrors import MirrorOptions

logger = logging.getLogger("clusterssl.eval_detection")


@dataclass(frozen=True)
class Config:
    network: inputs.NetworkOptions = inputs.NetworkOptions()
    detection: detection.DetectionOptions = detection.DetectionOptions()
    mirrors: MirrorOptions = MirrorOptions()
    launch: inputs.LaunchOptions = inputs.LaunchOptions()


def detector_of(config: Config, world: World, network: inputs.Network, num_classes: int) -> torch.nn.Module:
    """The detector on its device, what is not trained frozen."""
    options = config.detection
    torch.manual_seed(options.seed)
    model = detectors.build_detector(
        options.detector, network.backbone.requires_grad_(not options.frozen), num_classes, std=network.std,
        test_size=options.test_size, max_size=options.max_size, new_bn=options.new_bn, proposals=options.proposals,
    )  # fmt: skip
    return synchronise(model, "pytorch", 0, world.device).to(world.device)


def train(
    config: Config, world: World, network: inputs.Network, model: torch.nn.Module, images: DetectionSet
) -> None:  # fmt: skip
    """Train in the run directory, from its checkpoint if there is one."""
    options = config.detection
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=options.lr, momentum=0.9, weight_decay=options.wd)
    samplers = detectors.count_samples(model, options.seed)

    def batches(start: int) -> Iterator[detection.Batch]:
        detectors.set_mode(model, True, frozen=options.frozen)
        return detection.training_batches(
            images,
            start,
            options.steps,
            batch_size=options.batch_size,
            seed=options.seed,
            workers=options.data.usable_workers,
        )

    def step(number: int, batch: detection.Batch) -> torch.Tensor:
        rate = detection.rate_at(number, lr=options.lr, warmup=options.warmup, lr_steps=options.lr_steps)
        optimizer.param_groups[0]["lr"] = rate
        detectors.set_size(model, detectors.scale_of(number, options.seed, options.train_sizes))
        return detection.train_step(model, parameters, samplers, optimizer, number, batch, world.device)

    run = StepRun("eval_detection", options.dump_path, world, config.mirrors.mirrors)
    facts = {
        "network": network.fingerprint, "num_images": len(images.images), "classes": images.classes,
        "global_batch": options.batch_size * world.size,
    }  # fmt: skip
    run.open(cfg.plain(config), facts)
    run.fit(model, optimizer, options.steps, batches, step, save_every=options.checkpoint_every)


def main() -> None:
    config = cfg.parse(Config, description=__doc__)
    detection.check_metric()
    world = config.launch.join()
    options = config.detection
    images, test = open_sets(options.data_path, options.voc_years, options.detector == "mask_rcnn")
    network = inputs.open_network(config.network, data_path=options.data_path, seed=options.seed)
    model = detector_of(config, world, network, len(images.classes))
    train(config, world, network, model, images)
    numbers = detection.tested(model, test, options, world.device)
    told = ", ".join(f"{name} {value:.2f}" for name, value in numbers.items())
    logger.info("%s on %d images: %s", options.detector, len(test.images), told)
    record = {"detector": options.detector, "frozen": options.frozen, "steps": options.steps, **numbers}
    inputs.append_evaluation(options.dump_path, "detection", record, network, config.network, options.data)
    dist.leave()


if __name__ == "__main__":
    cfg.entry(main)
