"""SwAV: learn by predicting the cluster assignment of one view of an image from its other views.

Caron et al. 2020, https://arxiv.org/abs/2006.09882

    python main_swav.py                                                     # built-in digits, CPU or GPU
    python main_swav.py --data_path /imagenet/train --dump_path runs/mine   # your images, one process
    torchrun --nproc_per_node=8 main_swav.py --data_path /imagenet/train    # one node
    sbatch scripts/swav_400ep_pretrain.sh                                   # many nodes

Shape suffixes: B images, V views, A assigned views, N = V * B rows, D feature dimension, K prototypes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))
import clusterssl.early  # noqa: F401

import torch
from torch import Tensor, nn

from clusterssl import config as cfg
from clusterssl import options
from clusterssl.batchnorm import unchanged_statistics
from clusterssl.checkpoint import bare
from clusterssl.cluster.online import REMEDIES, AssignmentOptions, OnlineAssigner
from clusterssl.engine import fit
from clusterssl.feed import Feed
from clusterssl.method import Method
from clusterssl.monitor import Observation
from clusterssl.options import DataOptions, ModelOptions, OptimOptions, RunOptions, num_views
from clusterssl.pretrain import assemble, join, or_digits, prototype_net


@dataclass(frozen=True)
class SwAVOptions:
    """Objective."""

    crops_for_assign: tuple[int, ...] = (0, 1)
    """crops whose assignments are computed, each predicted from all other crops"""
    temperature: float = 0.1
    """of the softmax over prototypes in the loss"""
    nmb_prototypes: int = 3000
    """number of prototypes K"""
    freeze_prototypes_niters: int = 313
    """first steps in which the prototypes stay as they are"""
    freeze_prototypes_epochs: int = 0
    """the same counted in epochs; the longer of the two holds"""


@dataclass(frozen=True)
class Config:
    data: DataOptions = DataOptions()
    model: ModelOptions = ModelOptions()
    swav: SwAVOptions = SwAVOptions()
    assignment: AssignmentOptions = AssignmentOptions()
    optim: OptimOptions = OptimOptions()
    run: RunOptions = RunOptions()

    def __post_init__(self) -> None:
        views = num_views(self.data)
        cfg.require(views > 1, f"--nmb_crops {views}: SwAV compares views, it needs at least 2 crops")
        options.require_crops(self.swav.crops_for_assign, views)
        cfg.require_numbers(self.swav, "temperature", above=0)
        cfg.require_numbers(self.swav, "nmb_prototypes", least=2)


DIGITS = Config(
    options.DIGITS_DATA, options.DIGITS_MODEL, SwAVOptions(nmb_prototypes=60, freeze_prototypes_niters=0),
    AssignmentOptions(epsilon=0.03), options.DIGITS_OPTIM, RunOptions(dump_path="runs/swav_digits"),
)  # fmt: skip


def swapped_prediction(scores_NK: Tensor, q_ABK: Tensor, assigned: Sequence[int], temperature: float) -> Tensor:
    """Mean cross-entropy between the assignment of a view and the prediction from every other view, equations 1, 2, 6.

    Args:
        scores_NK: prototype scores of all views, row v * B + b for view v of image b.
        q_ABK: assignments of the views `assigned`, without gradient.
        assigned: positions of the assigned views among all.
        temperature: of the softmax.
    """
    log_p_VBK = (scores_NK.float() / temperature).log_softmax(1).unflatten(0, (-1, q_ABK.shape[1]))
    all_views_BK = log_p_VBK.sum(0)
    losses = [-(q_BK * (all_views_BK - log_p_VBK[a])).sum() for a, q_BK in zip(assigned, q_ABK, strict=True)]
    return torch.stack(losses).mean() / ((len(log_p_VBK) - 1) * q_ABK.shape[1])


class SwAV(Method):
    """Swapped prediction over multi-crop; assignments by Sinkhorn over the step's images and the queue."""

    def __init__(self, model: nn.Module, config: Config, feed: Feed) -> None:
        o = self.options = config.swav
        self.model, self.net = model, bare(model)
        self.prototypes = self.net.prototype_layers()[0]
        self.views, self.assigned = num_views(config.data), list(o.crops_for_assign)
        self.assigner = OnlineAssigner(config.assignment, len(self.assigned), feed.step_images)
        self.frozen_steps = max(o.freeze_prototypes_niters, o.freeze_prototypes_epochs * feed.steps_per_epoch)
        self.planned, self.remedies = list[Tensor](), REMEDIES

    def begin_epoch(self, epoch: int) -> None:
        self.assigner.begin_epoch(epoch, self.prototypes.weight)

    def begin_step(self, micro_batches: Iterator[tuple[list[Tensor], Tensor]]) -> None:
        """With accumulation: assign all micro-batches together, as one batch of their total size."""
        self.net.normalize_prototypes()
        with torch.no_grad(), unchanged_statistics(self.net):
            z = [self.of_assigned(self.model(crops)[0]) for crops, _ in micro_batches]
        q_ABK = self.assigner.assign(torch.cat(z, dim=1), self.prototypes.weight)
        self.planned = list(q_ABK.split([part.shape[1] for part in z], dim=1))

    def loss(self, crops: list[Tensor], index: Tensor) -> Tensor:
        """Swapped prediction of one (micro-)batch."""
        if not self.planned:
            self.net.normalize_prototypes()
        z_ND, scores_NK = self.model(crops)
        z_ABD = self.of_assigned(z_ND.detach())
        q_ABK = self.planned.pop(0) if self.planned else self.assigner.assign(z_ABD, self.prototypes.weight)
        z_ND, seen_NK, q_NK = (x.flatten(0, 1) for x in (z_ABD, self.of_assigned(scores_NK.detach()), q_ABK))
        self.seen = Observation(z_ND, seen_NK, q_NK)
        return swapped_prediction(scores_NK, q_ABK, self.assigned, self.options.temperature)

    def of_assigned(self, rows_NX: Tensor) -> Tensor:
        """Rows of the assigned views, [A, B, X]."""
        return torch.stack([rows_NX.unflatten(0, (self.views, -1))[a] for a in self.assigned])

    def before_step(self, step: int) -> None:
        if step < self.frozen_steps:
            self.prototypes.weight.grad = None

    def state_dict(self) -> dict[str, Any]:
        return self.assigner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.assigner.load_state_dict(state, self.prototypes.weight)


def main() -> None:
    config = cfg.parse(Config, description=__doc__, default=or_digits(Config(), DIGITS))
    with join(config.run) as world:
        fit(assemble("swav", config, world, prototype_net(config.swav.nmb_prototypes), SwAV))


if __name__ == "__main__":
    cfg.entry(main)
