"""SeLa: balanced labels for all images, now and then computed anew, are the classes that the network learns.

Asano et al. 2020, https://arxiv.org/abs/1911.05371

Shape suffixes: B images of a batch, M images of this rank, N images of the dataset, F features, H heads, K clusters.
"""

from __future__ import annotations

import bisect
import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clusterssl import dist
from clusterssl.checkpoint import bare
from clusterssl.cluster.memory import IGNORED, label_table
from clusterssl.cluster.offline import multi_head_cross_entropy
from clusterssl.cluster.transport import equal_labels, transport
from clusterssl.config import require
from clusterssl.feed import Feed
from clusterssl.method import Method
from clusterssl.models.headed import HeadedNet
from clusterssl.monitor import Observation
from clusterssl.sela_flags import Config

logger = logging.getLogger(__name__)

_CIFAR_EPOCHS = (200, 400, 800, 1600)
_LABEL_PASSES = 10**6
"""number of the first augmented label pass among the epochs, for its order and crops"""


class SeLa(Method):
    """Cross-entropy with labels of maximal likelihood among those that divide the images equally (equation 2)."""

    remedies = "Try a lower --base_lr, fewer clusters (--ncl) or stronger augmentation (--augs, --min_scale_crops)"

    def __init__(self, model: nn.Module, config: Config, feed: Feed) -> None:
        o = self.options = config.sela
        self.model, self.net, self.feed, self.transport = model, cast(HeadedNet, bare(model)), feed, config.transport
        require(o.ncl <= feed.num_images, f"--ncl {o.ncl}: more clusters than the {feed.num_images} images")
        self.times = update_times(config.optim.epochs, feed.num_images, o.nopts, even=o.cifar)
        self.updates, self.updated_at = 0, 0
        self.table_HN = equal_labels(feed.seed, feed.num_images, o.ncl, o.hc).to(feed.device)
        self.potentials_HK = torch.zeros(o.hc, o.ncl, dtype=torch.float64)

    def due(self, step: int) -> bool:
        """At most one update a step, so late ones wait for their turn."""
        return self.updates < len(self.times) and step * self.feed.global_batch >= self.times[self.updates]

    def refresh(self, step: int) -> None:
        """Label all images anew, for all heads or, in the variant for CIFAR, for the head whose epoch it is."""
        features_MF, index_M = self.look_at_all()
        heads, potentials_HK = range(self.options.hc), self.potentials_HK.clone()
        if self.options.cifar:
            heads = range(epoch := step // self.feed.steps_per_epoch % self.options.hc, epoch + 1)
        labels = []
        for h in heads:
            head, name = self.net.heads()[h], f"labels {self.updates + 1} of {len(self.times)}, head {h}"
            plan = transport(
                features_MF, head.weight, head.bias, sharpness=self.options.lamb, options=self.transport,
                start_K=potentials_HK[h], name=name,
            )  # fmt: skip
            potentials_HK[h] = plan.potentials_K
            labels.append(plan.labels_N)
        self.relabel(torch.tensor(heads), torch.stack(labels), index_M)
        self.potentials_HK, self.updates = potentials_HK, self.updates + 1
        self.updated_at = step * self.feed.global_batch

    @torch.no_grad()
    def look_at_all(self) -> tuple[Tensor, Tensor]:
        """What the heads see of this rank's images, [M, F] on the CPU, and their positions in the dataset."""
        published, feed = self.options.label_pass == "augmented", self.feed
        self.model.train(published)
        batches = ((x[0], at) for x, at in feed.augmented(_LABEL_PASSES + self.updates)) if published else feed.plain()
        first, end = dist.share(feed.num_images)
        rows = feed.steps_per_epoch * feed.step_images if published else end - first
        features_MF, index_M, filled = torch.empty(0), torch.empty(rows, dtype=torch.int64, device=feed.device), 0
        for images, where in batches:
            with feed.autocast():
                features_BF = self.net.features([images])
            features_BF = F.relu(features_BF) if self.net.relu_before_heads else features_BF
            if filled == 0:
                features_MF = features_BF.new_empty((rows, features_BF.shape[1]), device="cpu")
            part = slice(filled, filled := filled + len(where))
            features_MF[part], index_M[part] = features_BF.cpu(), where
        return features_MF, index_M

    def relabel(self, heads_h: Tensor, labels_hM: Tensor, index_M: Tensor) -> None:
        """Enter labels of all ranks into the table; images that were not looked at keep theirs."""
        first, _ = dist.share(self.feed.num_images)
        table_hN = label_table(labels_hM, index_M, first + torch.arange(len(index_M)), self.feed.num_images)
        before_hN = self.table_HN[heads_h]
        after_hN = torch.where(table_hN == IGNORED, before_hN, table_hN)
        self.table_HN[heads_h] = after_hN
        if dist.rank() == 0:
            changed = float((after_hN != before_hN).double().mean())
            logger.info("labels %d of %d: %.1f %% changed", self.updates + 1, len(self.times), 100 * changed)

    def loss(self, crops: list[Tensor], index: Tensor) -> Tensor:
        """Mean over heads of the cross-entropy with the images' labels, equation 1."""
        features_BF, scores_HBK = self.model(crops)
        seen_BF = F.normalize(features_BF[:, :256].detach().float())  # enough to see a collapse, and much cheaper
        self.seen = Observation(seen_BF, scores_HBK[0].detach(), None)
        return multi_head_cross_entropy(scores_HBK, self.table_HN[:, index].long())

    def state_dict(self) -> dict[str, Any]:
        schedule = {"updates": self.updates, "updated_at": self.updated_at, "last_time": self.times[-1]}
        return {"labels": self.table_HN, "potentials": self.potentials_HK, **schedule}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.table_HN = state["labels"].to(self.table_HN)
        self.potentials_HK = state["potentials"].to(self.potentials_HK)
        self.updates, self.updated_at = state["updates"], state["updated_at"]
        if state["last_time"] != self.times[-1]:  # another --epochs: times that have passed are dropped, as published
            self.updates = bisect.bisect_right(self.times, self.updated_at)


def update_times(epochs: int, images: int, nopts: int, *, even: bool = False) -> list[float]:
    """When labels are computed anew, in images seen, in increasing order (section 3.3).

    Args:
        epochs: of the run. The published script trains for one more than it is told, the one for CIFAR does not.
        images: N.
        nopts: number of times, the first before the first step.
        even: evenly spaced, as for CIFAR; otherwise the i-th grows with the square of i.
    """
    last = (epochs + 1.0001 if even else epochs + 0.01) * images
    return [last * (i / (nopts - 1)) ** (1 if even else 2) for i in range(nopts)] if nopts > 1 else [0.0]


def step_rate(epoch: int, base: float, lrdrop: int, drops: tuple[int, ...] = ()) -> float:
    """Learning rate of an epoch: a tenth after each drop; every `lrdrop` epochs and a thousandth from epoch 350 on."""
    if drops:
        return base * 0.1 ** sum(epoch >= drop for drop in drops)
    return base * 0.1 ** (epoch // lrdrop) if epoch < 350 else base * 1e-3


def cifar_rate(epoch: int, base: float, epochs: int) -> float:
    """Learning rate of an epoch in the variant for CIFAR, which only drops in runs of 200, 400, 800 or 1600 epochs."""
    start, width = 0.4 * epochs, 0.2 * epochs
    return base * 0.1 ** math.floor((epoch - start) / width) if epochs in _CIFAR_EPOCHS and epoch >= start else base


def learning_rate(config: Config, steps_per_epoch: int) -> Callable[[int], float]:
    """Learning rate of each step with --schedule steps."""
    o = config.optim
    if config.sela.cifar and not o.lr_drops:
        rate = partial(cifar_rate, base=o.base_lr, epochs=o.epochs)
    else:
        rate = partial(step_rate, base=o.base_lr, lrdrop=o.lrdrop, drops=o.lr_drops)
    return lambda step: rate(step // steps_per_epoch)
