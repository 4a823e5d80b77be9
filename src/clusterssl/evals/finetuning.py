"""Fine-tuning with few labels: the whole network is trained, its classifier at a learning rate of its own.

Caron et al. 2020, section 4.2 and appendix A; the published setting is 8 ranks x 32 images of ImageNet.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clusterssl import dist
from clusterssl.batchnorm import synchronise
from clusterssl.config import require, require_numbers
from clusterssl.data import eval_batches, resize_for
from clusterssl.evals import classifier as heads
from clusterssl.evals.features import Unreadable, augmented_steps, tell_left_out, timed
from clusterssl.evals.schedules import epoch_lr
from clusterssl.evals.setup import Setup
from clusterssl.evals.subsets import labelled
from clusterssl.evals.training import ClassifierRun
from clusterssl.models.build import MultiCropNet
from clusterssl.models.heads import prototypes

logger = logging.getLogger(__name__)

_IMAGES_AT_A_TIME = 256
_FEW_STEPS = 500


@dataclass(frozen=True)
class FinetuneOptions:
    """Fine-tuning."""

    labels_perc: float = 10.0
    """share of the training images whose labels are used, in percent: 1 or 10 (published), or any other"""
    label_list: str = ""
    """list of these images, one name or class/name a line: a file, an address, or "published" for the 1 % and 10 % of
    ImageNet by SimCLR, which all published results use; without it that share of every class is drawn by --seed"""
    epochs: int = 20
    """passes over the labelled images"""
    batch_size: int = 32
    """images per rank and step"""
    lr: float = 0.01
    """initial learning rate of the trunk; published: 0.01 with 10 % of the labels, 0.02 with 1 %"""
    lr_last_layer: float = 0.2
    """initial learning rate of the classifier; published: 0.2 with 10 % of the labels, 5 with 1 %"""
    decay_epochs: tuple[int, ...] = (12, 16)
    """epochs at which both learning rates fall"""
    gamma: float = 0.2
    """factor of each fall"""
    wd: float = 0.0
    """weight decay"""

    def __post_init__(self) -> None:
        share = self.labels_perc
        require(0 < share <= 100, f"--labels_perc {share:g}: a share in percent lies above 0 and is at most 100")
        require_numbers(self, "epochs", "batch_size", least=1)
        require_numbers(self, "lr", "lr_last_layer", "gamma", "wd", least=0)

    def rates(self, epoch: int) -> tuple[float, float]:
        """Learning rates of trunk and classifier in an epoch."""
        shape: Any = {"epochs": self.epochs, "decay_epochs": self.decay_epochs, "gamma": self.gamma}
        trunk, last = (epoch_lr(epoch, scheduler_type="step", lr=lr, **shape) for lr in (self.lr, self.lr_last_layer))
        return trunk, last


class Logits(nn.Module):
    """A network whose head gives class scores, with the published names: the trunk's and "projection_head"."""

    def __init__(self, backbone: nn.Module, num_classes: int, seed: int) -> None:
        super().__init__()
        head = nn.Linear(int(backbone.feature_dim), num_classes)  # type: ignore[arg-type]
        heads.init_linear(head, "default", torch.Generator().manual_seed(seed))
        self.module = MultiCropNet(backbone, head, prototypes(num_classes, 0), normalize=False)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Logits B x C."""
        return self.module([images_B3HW])[0]


class Finetuning:
    """One network on its way from pretrained to fine-tuned.

    Args:
        setup: network and images.
        options: of the training.

    Raises:
        UserError: a list of labels that does not fit.
    """

    def __init__(self, setup: Setup, options: FinetuneOptions) -> None:
        self.setup, self.options, device = setup, options, setup.world.device
        self.chosen = labelled(setup.train, options.labels_perc, options.label_list, setup.seed)
        if dist.rank() == 0 and not options.label_list and len(setup.train.classes) == 1000:
            logger.info("published results are on the lists of SimCLR: --label_list published")
        setup.network.backbone.requires_grad_(True)
        net = Logits(setup.network.backbone, len(setup.train.classes), setup.seed).to(device)
        self.about = {**net.module.record(), "size_crops": [list(setup.network.image_size)]}
        self.net = synchronise(net, "pytorch", 0, device)
        groups = [[p for name, p in self.net.named_parameters() if ("head" in name) == last] for last in (False, True)]
        self.optimizer = torch.optim.SGD(
            [{"params": group, "lr": lr} for group, lr in zip(groups, options.rates(0), strict=True)],
            momentum=0.9, weight_decay=options.wd,
        )  # fmt: skip

    def facts(self) -> dict[str, Any]:
        """What a resumed run must find as it was, whatever the flags say."""
        return {
            "network": self.setup.network.fingerprint, "image_size": list(self.setup.network.image_size),
            "labelled_images": len(self.chosen), "num_classes": len(self.setup.train.classes),
            "labelled": hashlib.sha256(np.int64(self.chosen).tobytes()).hexdigest()[:16],
            "global_batch": self.options.batch_size * self.setup.world.size,
        }  # fmt: skip

    def epoch(self, epoch: int) -> dict[str, Any]:
        """Train for one epoch, then test."""
        rates, device = self.options.rates(epoch), self.setup.world.device
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        loss, train_top1, _ = heads.train_epoch(self.net, self.optimizer, self._steps(epoch), device)
        val_loss, top1, top5 = heads.evaluate_probes(self.net, self._test_batches(), device)[0]
        return {
            "lr": rates[0], "lr_last_layer": rates[1], "loss": loss, "train_top1": train_top1, "val_loss": val_loss,
            "top1": top1, "top5": top5,
        }  # fmt: skip

    def _steps(self, epoch: int) -> Iterator[heads.Step]:
        """Random resized crops and flips; the last, incomplete step is kept."""
        setup, order = self.setup, heads.epoch_order(len(self.chosen), self.setup.seed, epoch)
        return augmented_steps(
            nn.Identity(), setup.train, self.chosen, order, image_size=setup.network.image_size,
            batch_size=self.options.batch_size, workers=setup.data.usable_workers, device=setup.world.device,
            seed=setup.seed, epoch=epoch, std=setup.network.std,
        )  # fmt: skip

    def _test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Centre crops and labels of this rank's share of the test images."""
        setup, size = self.setup, self.setup.network.image_size
        rows, ledger = np.arange(*dist.share(len(setup.val))), Unreadable(setup.val)
        batches = eval_batches(
            setup.val, rows, image_size=size, resize=resize_for(size), batch_size=_IMAGES_AT_A_TIME, ledger=ledger,
            workers=setup.data.usable_workers, device=setup.world.device, std=setup.network.std,
        )  # fmt: skip
        for batch in timed(batches, len(rows), setup.data.val_split):
            keep = torch.from_numpy(ledger.readable(batch.index.numpy()))
            yield batch.images[keep.to(batch.images.device)], batch.labels[keep]
        tell_left_out(torch.from_numpy(ledger.readable(rows)), setup.data.val_split)


def finetune(
    setup: Setup, options: FinetuneOptions, flags: dict[str, Any], dump_path: str | None = None
) -> list[dict[str, Any]]:
    """Fine-tune and test in the run directory; the same call resumes. A collective.

    Returns:
        Numbers of the best epoch.

    Raises:
        UserError: see `Setup`, or the directory holds another run.
        Stopped: a signal asked for it.
    """
    tuning = Finetuning(setup, options)
    run = ClassifierRun("eval_semisup", dump_path or setup.dump_path, setup.world, setup.mirrors)
    run.open({key: value for key, value in flags.items() if key != "label_list"}, tuning.facts())
    each = options.batch_size * setup.world.size
    steps = -(-len(tuning.chosen) // each) * options.epochs
    logger.info(
        "%d labelled images, %d a step, %d steps in all (published: 256 a step; 10,020 with 10 %%, 1,020 with 1 %%)",
        len(tuning.chosen), each, steps,
    )  # fmt: skip
    if steps < _FEW_STEPS:
        logger.warning("warning: %d steps may be too few for these rates; raise --epochs (and --decay_epochs)", steps)
    best = run.fit(tuning.net, tuning.optimizer, options.epochs, tuning.epoch, len(tuning.chosen), tuning.about)
    labels = {"labels_perc": options.labels_perc, "label_list": options.label_list, "seed": setup.seed}
    return [{**best, **labels, "labelled_images": len(tuning.chosen)}]
