"""Self-Classifier: learn to classify without labels, so that views of an image agree and all classes are as frequent.

Amrani et al. 2022, https://arxiv.org/abs/2103.10994

    python main_selfclassifier.py                                                     # built-in digits, CPU or GPU
    python main_selfclassifier.py --data_path /imagenet/train --dump_path runs/mine   # your images, one process
    torchrun --nproc_per_node=8 main_selfclassifier.py --data_path /imagenet/train    # one node
    sbatch scripts/selfclassifier_100ep_pretrain.sh                                   # many nodes

Shape suffixes: B images, V views, G global views, N = V * B rows, D embedding dimension, K classes of a classifier.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import log
from pathlib import Path
from statistics import fmean
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))
import clusterssl.early  # noqa: F401

import torch
from torch import Tensor, nn

from clusterssl import config as cfg
from clusterssl import selfclassifier_flags as flags
from clusterssl.batchnorm import unchanged_statistics
from clusterssl.checkpoint import bare
from clusterssl.cluster.neighbour_queue import NeighbourQueue
from clusterssl.cluster.two_softmax import cross_prediction, two_softmax
from clusterssl.cluster.whole_step import WholeStepLoss
from clusterssl.engine import fit
from clusterssl.feed import Feed
from clusterssl.method import Method
from clusterssl.models.selfclassifier import SelfClassifierNet
from clusterssl.monitor import Observation
from clusterssl.options import RunOptions, num_views
from clusterssl.pretrain import assemble, join, or_digits
from clusterssl.selfclassifier_flags import NetOptions, StepOptions, ViewOptions, translate

GLOBAL = 2


@dataclass(frozen=True)
class ObjectiveOptions:
    """Objective."""

    row_tau: float = 0.1
    """temperature of the softmax over classes"""
    col_tau: float = 0.05
    """temperature of the softmax over the batch"""
    eps: float = 1e-12
    """smallest normaliser, also added inside the logarithm"""
    queue_len: int = 262144
    """past embeddings, over all ranks, among which an image finds its nearest neighbour once there are so many"""
    no_nn_aug: bool = False
    """classify the first view itself instead of its nearest neighbour"""

    def __post_init__(self) -> None:
        cfg.require_numbers(self, "row_tau", "col_tau", "eps", "queue_len", above=0)


@dataclass(frozen=True)
class Config:
    data: ViewOptions = ViewOptions()
    model: NetOptions = NetOptions()
    objective: ObjectiveOptions = ObjectiveOptions()
    optim: StepOptions = StepOptions()
    run: RunOptions = RunOptions()


DIGITS = Config(
    flags.DIGITS_VIEWS, flags.DIGITS_NET, ObjectiveOptions(queue_len=4000), flags.DIGITS_STEPS,
    RunOptions(dump_path="runs/selfclassifier_digits"),
)  # fmt: skip


class SelfClassifier(Method):
    """The posterior of classes of one view is predicted from other views; view 1 stands for its nearest neighbour."""

    remedies = "Try a larger batch (--batch_size, --accumulate), fewer classes (--cls_size) or a lower --base_lr"

    def __init__(self, model: nn.Module, config: Config, feed: Feed) -> None:
        o = self.options = config.objective
        images, step, k = feed.num_images, feed.global_batch, max(config.model.cls_size)
        cfg.require(k <= images, f"--cls_size {k}: there are only {images} images; ask for fewer classes")
        cfg.require(o.no_nn_aug or o.queue_len >= step, f"--queue_len {o.queue_len}: a step has {step}; give as many")
        self.model, self.views, self.num_images = model, num_views(config.data), images
        dim, dtype = cast(SelfClassifierNet, bare(model)).mlp_head.out_dim, next(model.parameters()).dtype
        self.queue = None if o.no_nn_aug else NeighbourQueue(o.queue_len, dim, feed.device, dtype)
        self.step_loss, self.ln_k = WholeStepLoss(self.objective), fmean(map(log, config.model.cls_size))

    def objective(self, logits: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Loss of logits [V, B, K] of each classifier, and the first one's targets of the global views [G, B, K]."""
        posteriors = two_softmax(logits, self.options.row_tau, self.options.col_tau, self.options.eps)
        return cross_prediction(posteriors, GLOBAL), posteriors[0].target_VBK[:GLOBAL].detach()

    def scored(self, crops: list[Tensor], index: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Embeddings [V, B, D], and logits [V, B, K] of each classifier, those of view 1 from its neighbours."""
        e_ND, logits = self.model(crops, partial(self.with_neighbours, index_B=index))
        return e_ND.detach().unflatten(0, (self.views, -1)), [x_NK.unflatten(0, (self.views, -1)) for x_NK in logits]

    def with_neighbours(self, e_ND: Tensor, index_B: Tensor) -> Tensor:
        if self.queue is None or not self.queue.full:
            return e_ND
        first_BD, others_ND = e_ND[: len(index_B)].detach(), e_ND[len(index_B) :]
        return torch.cat([self.queue.nearest(first_BD, index_B), others_ND])

    def begin_step(self, micro_batches: Iterator[tuple[list[Tensor], Tensor]]) -> None:
        """With accumulation: the softmax over the batch runs over all micro-batches."""
        with torch.no_grad(), unchanged_statistics(self.model):
            outputs = [self.scored(crops, index)[1] for crops, index in micro_batches]
        self.step_loss.plan(outputs)

    def loss(self, crops: list[Tensor], index: Tensor) -> Tensor:
        """Mean cross-entropy over pairs of views and over classifiers."""
        e_VBD, logits = self.scored(crops, index)
        loss, target_GBK = self.step_loss(logits)
        if self.queue is not None:
            self.queue.push(e_VBD[0], index, more=not self.step_loss.complete)
        e, scores, targets = (x[:GLOBAL].flatten(0, 1) for x in (e_VBD, logits[0].detach(), target_GBK))
        self.seen = Observation(e, scores, targets, self.ln_k)
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {} if self.queue is None else self.queue.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.queue is not None:
            self.queue.load_state_dict(state, self.num_images)


def main() -> None:
    words = translate(sys.argv[1:], Config())
    config = cfg.parse(Config, words, description=__doc__, default=or_digits(Config(), DIGITS, words))
    with join(config.run) as world:
        fit(assemble(
            "selfclassifier", config, world, lambda c: c.model.build(c.data.size_crops), SelfClassifier,
            multicrop=config.data.multicrop(), augment=flags.AUGMENT,
            parameter_groups=lambda net, c: c.optim.groups(net),
        ))  # fmt: skip


if __name__ == "__main__":
    cfg.entry(main)
