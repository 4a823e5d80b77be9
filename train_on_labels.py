"""Train any network on labels from a file: pseudo-labels of a run, or those that assign.py wrote.

SeLa's last step (Asano et al. 2020, https://arxiv.org/abs/1911.05371, section 4): the labels that one network found
are learned by another from the beginning, with --rotation also how far an image is turned (Gidaris et al. 2018).

    python assign.py --pretrained runs/sela --labels --out pseudo.csv
    python train_on_labels.py --labels pseudo.csv --data_path imagenet/train --arch resnet50 --rotation

Shape suffixes: B images, R = 4 B rows with rotations, H heads, N images of the dataset, K clusters of a head.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))
import clusterssl.early  # noqa: F401

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clusterssl import config as cfg
from clusterssl import options
from clusterssl.cluster.offline import multi_head_cross_entropy
from clusterssl.data import MEAN, Augment
from clusterssl.engine import fit
from clusterssl.errors import UserError
from clusterssl.feed import Feed
from clusterssl.labelling.pseudo import LabelFile, read_labels
from clusterssl.method import Method
from clusterssl.models.build import resolve_stem
from clusterssl.models.headed import HeadedNet, build_headed
from clusterssl.models.published import published_arch
from clusterssl.monitor import Observation
from clusterssl.options import RunOptions, TrunkOptions
from clusterssl.pretrain import assemble, join, or_digits
from clusterssl.sela import step_rate
from clusterssl.sela_flags import ImageOptions, StepOptions


@dataclass(frozen=True)
class LabelOptions:
    """Labels."""

    labels: str = ""
    """CSV of path and one label for each head, as assign.py writes it"""
    rotation: bool = False
    """also turn every image by 0, 90, 180 and 270 degrees and learn which it was, with a head of its own"""


@dataclass(frozen=True)
class Config:
    labels: LabelOptions = LabelOptions()
    data: ImageOptions = ImageOptions()
    model: TrunkOptions = TrunkOptions()
    optim: StepOptions = StepOptions(
        91, 64, optimizer="sgd", base_lr=0.05, wd=1e-5, warmup_epochs=0, lr_drops=(30, 60, 80)
    )
    run: RunOptions = RunOptions()

    def __post_init__(self) -> None:
        square = all(height == width for height, width in self.data.size_crops)
        cfg.require(square or not self.labels.rotation, "--rotation: needs square crops (--size_crops)")


class OnLabels(Method):
    """Mean over heads of the cross-entropy with fixed labels, plus that of the rotation head."""

    remedies = "Try a lower --base_lr or softer augmentation (--color_jitter)"

    def __init__(self, labels: LabelFile, model: nn.Module, config: Config, feed: Feed) -> None:
        self.model, self.rotation = model, config.labels.rotation
        self.table_HN = torch.from_numpy(labels.of(feed.loader.source)).to(feed.device)

    def loss(self, crops: list[Tensor], index: Tensor) -> Tensor:
        """Labels are those of the upright images, the rotation head sees all four."""
        (upright,) = crops
        turned = torch.cat([upright.rot90(turns, (2, 3)) for turns in range(4)]) if self.rotation else upright
        features_RF, scores_HRK = self.model([turned])
        scores_HBK = [scores_RK[: len(upright)] for scores_RK in scores_HRK]
        seen_BF = F.normalize(features_RF[: len(upright), :256].detach().float())
        self.seen = Observation(seen_BF, scores_HBK[0].detach(), None)
        loss = multi_head_cross_entropy(scores_HBK[: len(self.table_HN)], self.table_HN[:, index].long())
        if not self.rotation:
            return loss
        turns_R = torch.arange(4, device=upright.device).repeat_interleave(len(upright))
        return loss + F.cross_entropy(scores_HRK[-1], turns_R)

    def state_dict(self) -> dict[str, Any]:
        return {"labels": self.table_HN}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not torch.equal(state["labels"].to(self.table_HN), self.table_HN):
            raise UserError("--labels: not the labels that this run began with; start in another --dump_path")


def make_model(sizes: list[int], config: Config) -> HeadedNet:
    """The network with a head for each column of labels, then one for the four rotations."""
    stem = resolve_stem(config.model.stem, max(max(size) for size in config.data.size_crops))
    arch = published_arch("sela", config.model.arch)
    cut = arch.startswith("sela_alexnet")
    heads = [*sizes, 4] if config.labels.rotation else sizes
    return build_headed(arch, stem, heads, relu_before_heads=cut, head_std=0.01 if cut else 0.0)


def rate(config: Config, steps_per_epoch: int) -> Any:
    """Learning rate of each step with --schedule steps."""
    o = config.optim
    return lambda step: step_rate(step // steps_per_epoch, o.base_lr, o.lrdrop, o.lr_drops)


DIGITS = Config(
    data=ImageOptions(**{**vars(options.DIGITS_DATA), "nmb_crops": (1,), "hue_jitter": 0.125}),
    model=options.DIGITS_TRUNK,
    optim=StepOptions(30, 100, optimizer="adamw", base_lr=3e-3, warmup_epochs=2, schedule="cosine"),
    run=RunOptions(dump_path="runs/labels_digits"),
)  # fmt: skip


def main() -> None:
    config = cfg.parse(Config, description=__doc__, default=or_digits(Config(), DIGITS))
    labels = read_labels(config.labels.labels)
    with join(config.run) as world:
        fit(assemble(
            "labels", config, world, partial(make_model, labels.sizes), partial(OnLabels, labels),
            multicrop=config.data.multicrop(), augment=Augment(MEAN, (0.229, 0.224, 0.225)),
            learning_rate=rate if config.optim.schedule == "steps" else None,
        ))  # fmt: skip


if __name__ == "__main__":
    cfg.entry(main)
