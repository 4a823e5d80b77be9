"""Training and testing detectors on a pretrained residual network, fine-tuned or frozen.

He et al. 2020 (MoCo), section 4.2: all layers are trained, with BatchNorm over all ranks, in the new layers as well.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clusterssl import dist
from clusterssl.config import require, require_numbers
from clusterssl.data.loader import checked
from clusterssl.errors import UserError
from clusterssl.evals import inputs
from clusterssl.evals.detection_data import DetectionSet, Target, object_batches
from clusterssl.evals.detectors import CountedSampler, Detector, set_size
from clusterssl.evals.pace import paced
from clusterssl.evals.steps import steps_from, sum_gradients

Batch = tuple[list[tuple[Tensor, Target, int]], int]
"""this rank's images, targets and positions, and the number of images of all ranks"""


@dataclass(frozen=True)
class DetectionOptions:
    """Detector and training."""

    data_path: str = ""
    """folder that holds VOCdevkit/VOC2007 and VOC2012, or COCO's annotations/, train2017/ and val2017/"""
    voc_years: tuple[int, ...] = (2007, 2012)
    """years of VOC whose trainval images are trained on; tested on those of 2007"""
    detector: Detector = "faster_rcnn"
    """faster_rcnn, mask_rcnn (COCO only) or retinanet, each with a feature pyramid"""
    frozen: bool = False
    """keep the pretrained network as it is and train the new layers only"""
    new_bn: bool = True
    """BatchNorm over all ranks in the new layers: pyramid, box and mask head"""
    proposals: int = 512
    """of Faster and Mask R-CNN that are trained on per image"""
    steps: int = 24000
    """optimiser steps; COCO's usual schedule is --steps 90000 --lr_steps 60000 80000"""
    batch_size: int = 2
    """images per rank and step"""
    lr: float = 0.02
    """learning rate for 16 images a step; it is not scaled with the batch"""
    lr_steps: tuple[int, ...] = (18000, 22000)
    """steps after which it falls to a tenth"""
    warmup: int = 100
    """steps of linear warm-up"""
    wd: float = 1e-4
    """weight decay"""
    train_sizes: tuple[int, ...] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    """shorter side of training images in pixels, drawn for every step"""
    test_size: int = 800
    """shorter side of test images"""
    max_size: int = 1333
    """longest side"""
    workers: int = 10
    """loader processes per rank; at most the number of cores is used, 0 loads in this process"""
    checkpoint_every: int = 1000
    """steps between checkpoints"""
    dump_path: str = "."
    """run directory; the same command there resumes by itself"""
    seed: int = 31
    """of new weights, order, flips, sizes, and of the anchors and proposals that are trained on"""

    def __post_init__(self) -> None:
        require_numbers(self, "proposals", "steps", "batch_size", "test_size", "max_size", "checkpoint_every", least=1)
        require_numbers(self, "lr", "train_sizes", above=0)
        require(len(self.voc_years) > 0 and self.warmup >= 0, "--voc_years needs a year, --warmup 0 or more")

    @property
    def data(self) -> inputs.DataOptions:
        """These flags as other evaluations name them."""
        return inputs.DataOptions(data_path=self.data_path, val_split="test", workers=self.workers)


def rate_at(step: int, *, lr: float, warmup: int, lr_steps: Sequence[int]) -> float:
    """Learning rate: from lr / 1000 linearly over the warm-up, then a tenth after each of `lr_steps`."""
    ramp = min(1.0, 0.001 + 0.999 * step / warmup) if warmup else 1.0
    return lr * ramp * 0.1 ** sum(step >= fall for fall in lr_steps)


def training_batches(
    images: DetectionSet, start: int, total: int, *, batch_size: int, seed: int, workers: int
) -> Iterator[Batch]:
    """Steps `start` to `total` - 1; the loader begins anew with every epoch, whose last images may be left out.

    BatchNorm waits for all ranks: none may be without images.

    Raises:
        UserError: fewer images than ranks.
    """
    usable = images.with_objects()
    if len(usable) < dist.size():
        raise UserError(f"{len(usable)} images with objects for {dist.size()} ranks; use fewer ranks")
    steps = itertools.islice(steps_from(start, len(usable), batch_size, seed, whole=True), total - start)
    for _, of_epoch in itertools.groupby(steps, key=lambda step: step[0]):
        plan = list(of_epoch)
        keys = [[(epoch, int(usable[i])) for i in rows] for epoch, rows, _ in plan]
        batches = checked(object_batches(images, keys, training=True, seed=seed, workers=workers))
        for _, _, count in plan:
            yield next(batches), count


def train_step(
    model: nn.Module, parameters: Sequence[nn.Parameter], samplers: Sequence[CountedSampler],
    optimizer: torch.optim.Optimizer, number: int, batch: Batch, device: torch.device,
) -> Tensor:  # fmt: skip
    """One step on the mean of the losses of all images of all ranks; returns it."""
    items, total = batch
    optimizer.zero_grad()
    loss = parameters[0].new_zeros(())
    for sampler in samplers:
        sampler.step, sampler.index = number, [i for _, _, i in items]
    pixels = [image.to(device, torch.float32) / 255 for image, _, _ in items]
    targets = [{name: tensor.to(device) for name, tensor in target.items()} for _, target, _ in items]
    loss = sum(model(pixels, targets).values(), loss) * (len(items) / total)
    loss.backward()
    sum_gradients(parameters)
    optimizer.step()
    return dist.all_reduce_(loss.detach())


@torch.no_grad()
def detections(model: nn.Module, images: DetectionSet, device: torch.device, workers: int) -> Iterator[tuple[Any, Any]]:
    """Prediction and target of every image of this rank's share, on the CPU."""
    first, last = dist.share(len(images.images))
    keys = [[(0, i)] for i in range(first, last)]
    batches = checked(object_batches(images, keys, training=False, seed=0, workers=workers))
    for ((image, target, _),) in paced(batches, len(keys), "testing"):
        (found,) = model([image.to(device, torch.float32) / 255])
        found = {name: tensor.cpu() for name, tensor in found.items()}
        if "masks" in found:
            found["masks"] = (found["masks"][:, 0] > 0.5).to(torch.uint8)
        yield found, target


def check_metric() -> None:
    """Refuse to begin what could not be evaluated at the end.

    Raises:
        UserError: torchmetrics or faster-coco-eval is not installed.
    """
    absent = [name for name in ("torchmetrics", "faster_coco_eval") if importlib.util.find_spec(name) is None]
    if absent:
        words = " ".join(name.replace("_", "-") for name in absent)
        raise UserError(f"detection needs {' and '.join(words.split())}; run pip install {words}")


def box_precisions(pairs: Iterable[tuple[dict[str, Tensor], Target]], masks: bool = False) -> dict[str, float]:
    """COCO's mean average precisions in percent: over all thresholds, at 0.5, at 0.75, and by the objects' size.

    A collective; each rank passes its own images. Crowds and VOC's difficult objects are neither found nor missed.

    Args:
        pairs: predictions (boxes, labels, scores, with `masks` also masks) and targets.
        masks: score masks too.

    Returns:
        {"map", "map_50", "map_75", "map_small", "map_medium", "map_large"}, with masks also "segm_map" ...; those of
        sizes without objects are left out.
    """
    from torchmetrics.detection import MeanAveragePrecision

    kinds: tuple[Literal["bbox", "segm"], ...] = ("bbox", "segm") if masks else ("bbox",)
    metric = MeanAveragePrecision(
        iou_type=kinds if masks else "bbox", backend="faster_coco_eval", sync_on_compute=False
    )  # fmt: skip
    metric.warn_on_many_detections = False
    for found, target in pairs:
        metric.update([found], [{**target, "iscrowd": target["iscrowd"].long()}])
    _gather(metric)
    values = dist.broadcast_object(
        {name: value.tolist() for name, value in metric.compute().items()} if dist.rank() == 0 else {}
    )
    numbers = {}
    for kind, name in itertools.product(kinds, ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")):
        value = values[f"{kind}_{name}" if masks else name]
        if value >= 0:  # -1 stands for none
            numbers[name if kind == "bbox" else f"segm_{name}"] = 100 * value
    return numbers


def _gather(metric: Any) -> None:
    """Put what all ranks have seen together in rank order; torchmetrics' own way wants as many images on every rank."""
    parts = dist.gather_objects(metric.metric_state)
    for name in parts[0]:
        setattr(metric, name, [entry for part in parts for entry in part[name]])


def tested(model: nn.Module, images: DetectionSet, options: DetectionOptions, device: torch.device) -> dict[str, float]:
    """`box_precisions` of a trained detector; for Mask R-CNN of its masks too."""
    model.eval()
    set_size(model, options.test_size)
    pairs = detections(model, images, device, options.data.usable_workers)
    return box_precisions(pairs, options.detector == "mask_rcnn")
