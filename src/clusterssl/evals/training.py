"""Training a classifier in a run directory: SGD flags, checkpoints, resuming, the best epoch."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from clusterssl import dist
from clusterssl.config import require, require_numbers
from clusterssl.dist import World
from clusterssl.errors import Stopped
from clusterssl.evals.schedules import epoch_lr, step_lr
from clusterssl.models.weights import load_published, published_state_dict
from clusterssl.optim import LARS
from clusterssl.preemption import StopRequest, requeue
from clusterssl.run import Run

logger = logging.getLogger(__name__)

_IMMATERIAL = """
    data_path pretrained arch stem image_size workers batch_size train_augmentation dump_path device dist_url
    join_timeout_seconds world_size rank local_rank cache_features tensorboard wandb
"""
FREE = frozenset(_IMMATERIAL.split())
"""flags that may differ when a run is resumed: the network, the global batch and the images are compared instead"""


@dataclass(frozen=True)
class SgdOptions:
    """Optimisation."""

    epochs: int = 100
    """passes over the images"""
    batch_size: int = 32
    """images per rank and step"""
    lr: float = 0.3
    """initial learning rate; it is not scaled with the batch"""
    wd: float = 1e-6
    """weight decay"""
    nesterov: bool = False
    """Nesterov momentum"""
    lars: bool = False
    """scale the step of every parameter by its norm, as Self-Classifier does"""
    scheduler_type: Literal["step", "cosine", "inverse_sqrt"] = "cosine"
    """how the learning rate falls from epoch to epoch; inverse_sqrt: from step to step, lr / sqrt(1 + lr wd step)"""
    decay_epochs: tuple[int, ...] = (60, 80)
    """epochs at which the step schedule falls"""
    gamma: float = 0.1
    """factor of each fall of the step schedule"""
    final_lr: float = 0.0
    """learning rate the cosine ends at"""

    def __post_init__(self) -> None:
        require_numbers(self, "epochs", "batch_size", least=1)
        require_numbers(self, "lr", "wd", "gamma", "final_lr", least=0)
        require(not (self.lars and self.nesterov), "--lars --nesterov: LARS has plain momentum; leave one out")

    def optimizer(self, classifier: nn.Module) -> torch.optim.Optimizer:
        """SGD with momentum 0.9, or LARS."""
        parameters = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
        if self.lars:
            return LARS(parameters, self.lr, weight_decay=self.wd)
        return torch.optim.SGD(parameters, lr=self.lr, momentum=0.9, weight_decay=self.wd, nesterov=self.nesterov)

    def rate(self, epoch: int, step: int = 0) -> float:
        """Learning rate of an epoch, and of a step counted over all epochs."""
        if self.scheduler_type == "inverse_sqrt":
            return step_lr(step, lr=self.lr, wd=self.wd)
        return epoch_lr(
            epoch, scheduler_type=self.scheduler_type, lr=self.lr, epochs=self.epochs, decay_epochs=self.decay_epochs,
            gamma=self.gamma, final_lr=self.final_lr,
        )  # fmt: skip


class ClassifierRun:
    """One classifier on its way through the epochs, in its run directory."""

    def __init__(self, name: str, folder: str, world: World, mirrors: Sequence[str] = ()) -> None:
        """Name the kind of evaluation, the directory, where records are copied; nothing is written before `open`."""
        self.name, self.run, self.world = name, Run(folder, world, mirrors), world
        self.best: dict[str, Any] = {}
        self.best_layers: dict[str, dict[str, Any]] = {}

    def open(self, flags: dict[str, Any], facts: dict[str, Any]) -> None:
        """Check that the directory is this run's or free, and record this start.

        Raises:
            UserError: it holds something else.
        """
        self.run.open(self.name, flags, facts, frozenset(flags) - FREE)

    def fit(
        self, classifier: nn.Module, optimizer: torch.optim.Optimizer, epochs: int,
        one_epoch: Callable[[int], dict[str, Any]], images: int, about: dict[str, Any] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Train from the checkpoint, if there is one, to the last epoch; a checkpoint after each.

        Args:
            classifier: what is trained; its names get the prefixes of published files.
            optimizer: of its parameters.
            epochs: number of epochs.
            one_epoch: trains and tests one epoch, numbered from 0; returns at least "loss", "lr", "top1", "top5"; with
                several classifiers under "layers" the "top1" and "top5" of each by name.
            images: training images of an epoch, for the speed in the log.
            about: of the network, for its checkpoints.

        Returns:
            Numbers of the epoch of highest "top1" (the first of them), its "epoch" numbered from 1. `best_layers` holds
            the same of each of several classifiers.

        Raises:
            UserError: a loss that is not finite, or a directory that cannot be written.
            Stopped: a signal asked for it; the epoch under way was finished and saved.
        """
        start = self._resume(classifier, optimizer)
        self.run.begin(start)
        with StopRequest() as request:
            for epoch in range(start, epochs):
                began = time.monotonic()
                numbers = {"epoch": epoch + 1, **one_epoch(epoch)}
                improved = not self.best or numbers["top1"] > self.best["top1"]
                self.best = numbers if improved else self.best
                for layer, scores in numbers.get("layers", {}).items():
                    if scores["top1"] > self.best_layers.get(layer, {"top1": -1.0})["top1"]:
                        self.best_layers[layer] = {**scores, "epoch": epoch + 1}
                speed = images / max(time.monotonic() - began, 1e-9)
                self._tell(numbers, epochs, speed)
                self._save(classifier, optimizer, epoch + 1, improved, about or {})
                self._maybe_stop(request, epoch + 1, epochs)
        self.run.close()
        return self.best

    def _tell(self, numbers: dict[str, Any], epochs: int, speed: float) -> None:
        self.run.log({**numbers, "best_top1": self.best["top1"], "images_per_s": round(speed, 1)})
        logger.info(
            "epoch %d of %d, lr %.4g, loss %.4f, top-1 %.2f, top-5 %.2f, best top-1 %.2f (epoch %d), %.0f images/s",
            numbers["epoch"], epochs, numbers["lr"], numbers["loss"], numbers["top1"], numbers["top5"],
            self.best["top1"], self.best["epoch"], speed,
        )  # fmt: skip
        if layers := numbers.get("layers"):
            logger.info("  top-1 of %s", ", ".join(f"{name} {scores['top1']:.2f}" for name, scores in layers.items()))

    def _save(
        self, classifier: nn.Module, optimizer: torch.optim.Optimizer, epochs: int, improved: bool,
        about: dict[str, Any],
    ) -> None:  # fmt: skip
        state = {
            "epoch": epochs,
            "state_dict": published_state_dict(classifier),
            "optimizer": optimizer.state_dict(),
            "scheduler": {"last_epoch": epochs},
            "best_acc": self.best["top1"],
            "best": self.best,
            "best_layers": self.best_layers,
            **({"model": about} if about else {}),
        }
        self.run.save(state, {}, step=epochs, keep_as="best.pth.tar" if improved else "")

    def _resume(self, classifier: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        state = self.run.load()
        if state is None:
            return 0
        load_published(classifier, state["state_dict"], str(self.run.folder))
        optimizer.load_state_dict(state["optimizer"])
        self.best, self.best_layers = state["best"], state.get("best_layers", {})
        logger.info("resuming after epoch %d, best top-1 %.2f", state["epoch"], self.best["top1"])
        return int(state["epoch"])

    def _maybe_stop(self, request: StopRequest, done: int, epochs: int) -> None:
        asked = int(dist.all_reduce_(torch.tensor(int(bool(request.received))), "max"))
        if not asked or done == epochs:
            return
        requeue(request.received)
        name = request.received or "a signal to another rank"
        raise Stopped(f"stopped by {name} after epoch {done} of {epochs}; the same command continues there")
