"""VOC2007 classification: several labels an image, fine-tuned or with a frozen trunk (Caron et al. 2018, section 4.3).

Suffixes: N images, B images of a batch, V views of an image, C classes, F features.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from clusterssl import dist
from clusterssl.config import require, require_numbers
from clusterssl.data.views import Cut, view_batches
from clusterssl.evals import inputs
from clusterssl.evals.average_precision import IGNORED
from clusterssl.evals.pace import paced
from clusterssl.evals.steps import steps_from, sum_gradients
from clusterssl.evals.vocdevkit import ImageFiles
from clusterssl.models.trunks import ConvTrunk
from clusterssl.rng import Stream, uniform

_IMAGES_AT_A_TIME = 4  # of ten crops each
_DROPOUTS = 16  # more than any network has


@dataclass(frozen=True)
class VocOptions:
    """Images and training."""

    vocdir: str = ""
    """folder that holds VOCdevkit/VOC2007, or that folder itself"""
    split: Literal["train", "trainval"] = "train"
    """trained on; train is tested on val, trainval on test"""
    workers: int = 10
    """loader processes per rank; at most the number of cores is used, 0 loads in this process"""
    nit: int = 80000
    """optimiser steps"""
    batch_size: int = 16
    """images per rank and step"""
    fc6_8: bool = True
    """train the linear layers only (those of AlexNet and VGG start anew); false: everything"""
    train_batchnorm: bool = False
    """train weight and bias of every BatchNorm too; its statistics stay"""
    eval_random_crops: bool = True
    """test on ten random crops as in training; false: four corners, the centre and their mirror images"""
    lr: float = 0.003
    """initial learning rate; it is not scaled with the batch"""
    stepsize: int = 5000
    """steps after which the learning rate is halved, again and again"""
    wd: float = 1e-6
    """weight decay"""
    min_scale: float = 0.1
    """smallest area of a training crop, as a fraction of the image"""
    max_scale: float = 0.5
    """largest area of a training crop"""
    checkpoint_every: int = 1000
    """steps between checkpoints"""
    dump_path: str = "."
    """run directory; the same command there resumes by itself"""
    seed: int = 31
    """of new weights, order, crops, dropout and draws of labels"""

    def __post_init__(self) -> None:
        require_numbers(self, "nit", "batch_size", "stepsize", "checkpoint_every", least=1)
        require_numbers(self, "lr", above=0)
        scales = 0 < self.min_scale <= self.max_scale <= 1
        require(scales, f"--min_scale {self.min_scale} --max_scale {self.max_scale}: need 0 < min <= max <= 1")

    @property
    def data(self) -> inputs.DataOptions:
        """These flags as other evaluations name them."""
        tested = {"train": "val", "trainval": "test"}[self.split]
        return inputs.DataOptions(data_path=self.vocdir, val_split=tested, workers=self.workers)


class CountedDropout(nn.Module):
    """Dropout whose masks are a function of seed, step, layer and dataset position, not of the number of ranks."""

    def __init__(self, p: float, seed: int, layer: int) -> None:
        super().__init__()
        self.p, self.seed, self.layer = p, seed, layer
        self.step = 0
        self.index: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def forward(self, x_BF: Tensor) -> Tensor:
        """Drop entries of B x F with probability p while training; scales up the others."""
        if not self.training or self.p == 0:
            return x_BF
        drawn = uniform(self.seed, Stream.DROPOUT, self.step * _DROPOUTS + self.layer, self.index, x_BF[0].numel())
        kept = torch.from_numpy(drawn >= self.p).view(x_BF.shape).to(x_BF.device)
        return x_BF * kept / (1 - self.p)


class VocNet(nn.Module):
    """A backbone, whose own linear layers start anew, and a linear layer with one output per class.

    Args:
        backbone: from images to features.
        num_classes: C.
        seed: of new weights and of dropout.
    """

    def __init__(self, backbone: nn.Module, num_classes: int, seed: int = 0) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(seed)
        self.trunk = backbone
        self.cut = isinstance(backbone, ConvTrunk)
        self.top = nn.Linear(int(backbone.feature_dim), num_classes)  # type: ignore[arg-type]
        reach = self.top.in_features**-0.5
        nn.init.uniform_(self.top.weight, -reach, reach, generator=draws)
        nn.init.constant_(self.top.bias, 0.1)
        for layer in self.linears():
            nn.init.normal_(layer.weight, std=0.01, generator=draws)
            nn.init.constant_(layer.bias, 0.1)
        self.dropouts = _count_dropouts(backbone, seed)

    def linears(self) -> list[nn.Linear]:
        """The linear layers between convolutions and features: fc6 and fc7 of AlexNet and VGG, none of a ResNet."""
        classifier = getattr(self.trunk, "classifier", None)
        return (
            [m for m in classifier.modules() if isinstance(m, nn.Linear)] if isinstance(classifier, nn.Module) else []
        )

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Logits B x C."""
        features_BF = self.trunk(images_B3HW)
        return self.top(F.relu(features_BF) if self.cut else features_BF)

    def trained(self, *, fc6_8: bool, train_batchnorm: bool) -> list[nn.Parameter]:
        """Freeze what is not trained and return the rest.

        Args:
            fc6_8: only the linear layers; else everything.
            train_batchnorm: the weights and biases of BatchNorm too.
        """
        self.requires_grad_(not fc6_8)
        norms = [m for m in self.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for module in (*self.linears(), self.top, *(norms if train_batchnorm else ())):
            module.requires_grad_(True)
        return [p for p in self.parameters() if p.requires_grad]

    def train(self, mode: bool = True) -> VocNet:
        """Training mode is that of dropout alone: BatchNorm keeps its statistics, as published."""
        super().train(False)
        for dropout in self.dropouts:
            dropout.train(mode)
        return self

    def draw(self, step: int, index_B: Tensor) -> None:
        """Tell the dropout layers which step and images come next."""
        for dropout in self.dropouts:
            dropout.step, dropout.index = step, index_B.numpy()


def _count_dropouts(backbone: nn.Module, seed: int) -> list[CountedDropout]:
    """Replace torch's dropout, whose masks depend on the number of ranks."""
    names = [name for name, module in backbone.named_modules() if isinstance(module, nn.Dropout)]
    dropouts = []
    for layer, name in enumerate(names):
        old = backbone.get_submodule(name)
        assert isinstance(old, nn.Dropout)
        dropouts.append(CountedDropout(old.p, seed, layer))
        backbone.set_submodule(name, dropouts[-1])
    return dropouts


def multilabel_loss(logits_BC: Tensor, labels_BC: Tensor) -> Tensor:
    """Sum over images and classes of the binary cross-entropy, entries labelled `IGNORED` left out."""
    counted = labels_BC != IGNORED
    target = (labels_BC == 1).to(logits_BC)
    return (F.binary_cross_entropy_with_logits(logits_BC, target, reduction="none") * counted).sum()


class VocStep(NamedTuple):
    """This rank's rows of one training step; `total` counts the rows of all ranks."""

    views: Tensor | None
    """B x 3 x h x w; None where this rank has no rows"""
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    total: int


def training_steps(
    images: ImageFiles, cut: Cut, start: int, total: int, *, batch_size: int, seed: int, workers: int,
    device: torch.device, std: Sequence[float],
) -> Iterator[VocStep]:  # fmt: skip
    """Steps `start` to `total` - 1 over random crops; the loader begins anew with every epoch."""
    steps = itertools.islice(steps_from(start, len(images), batch_size, seed), total - start)
    for _, of_epoch in itertools.groupby(steps, key=lambda step: step[0]):
        plan = list(of_epoch)
        keys = [[(epoch, i) for i in rows.tolist()] for epoch, rows, _ in plan if len(rows)]
        batches = view_batches(images, keys, cut, workers=workers, device=device, std=std)
        for _, rows, count in plan:
            yield VocStep(next(batches)[0][:, 0] if len(rows) else None, rows, count)


def train_step(
    net: VocNet, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, number: int, step: VocStep,
    labels_NC: Tensor,
) -> Tensor:  # fmt: skip
    """One step of SGD on the mean loss over all ranks' images, gradients clipped to a norm of 10; returns that loss."""
    net.train()
    optimizer.zero_grad()
    loss = parameters[0].new_zeros(())
    if step.views is not None:
        net.draw(number, step.index)
        loss = multilabel_loss(net(step.views), labels_NC[step.index.to(labels_NC.device)]) / step.total
        loss.backward()
    sum_gradients(parameters)
    nn.utils.clip_grad_norm_(parameters, 10.0)
    optimizer.step()
    return dist.all_reduce_(loss.detach())


@torch.no_grad()
def summed_outputs(
    net: nn.Module, images: ImageFiles, columns: int, cut: Cut, epochs: Sequence[int] = (0,), *, workers: int,
    device: torch.device, std: Sequence[float],
) -> Tensor:  # fmt: skip
    """What a network gives, summed over all views of each image: float64 N x columns on the CPU, on every rank.

    Args:
        net: from images to rows of `columns` numbers.
        images: shared out over the ranks.
        columns: numbers of an output.
        cut: views of an image.
        epochs: each gives other random views.
        workers, device, std: see `view_batches`.
    """
    net.eval()
    total = torch.zeros(len(images), columns, dtype=torch.float64)
    chunks = torch.arange(len(images)).split(_IMAGES_AT_A_TIME)  # the same on any number of ranks
    first, last = dist.share(len(chunks))
    keys = [[(epoch, i) for i in rows.tolist()] for epoch in epochs for rows in chunks[first:last]]
    batches = view_batches(images, keys, cut, workers=workers, device=device, std=std)
    for views, index in paced(batches, len(keys) * _IMAGES_AT_A_TIME, "views", _IMAGES_AT_A_TIME):
        total[index] += net(views.flatten(0, 1)).unflatten(0, views.shape[:2]).double().sum(1).cpu()
    return dist.all_reduce_(total)
