"""SeLa-v2 and SeLa: labels that divide all images equally among the clusters are learned as classes.

Version 2 of Caron et al. 2020, https://arxiv.org/abs/2006.09882, appendix D, of which no code was published;
version 1 of Asano et al. 2020, https://arxiv.org/abs/1911.05371, in src/clusterssl/sela.py

    python main_sela.py                                                     # built-in digits, CPU or GPU
    python main_sela.py --version 1                                         # version 1; with --help its flags
    python main_sela.py --data_path /imagenet/train --dump_path runs/mine   # your images, one process
    torchrun --nproc_per_node=8 main_sela.py --data_path /imagenet/train    # one node
    sbatch scripts/selav2_400ep_pretrain.sh                                 # many nodes

Shape suffixes: N rows of all views, M slots of the memory, D feature dimension, H heads, K prototypes of a head.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))
import clusterssl.early  # noqa: F401

import torch
from torch import Tensor, nn

from clusterssl import config as cfg
from clusterssl import options, sela_flags
from clusterssl.cluster.transport import TransportOptions
from clusterssl.cluster.transport_labels import TransportLabels
from clusterssl.engine import fit
from clusterssl.feed import Feed
from clusterssl.offline_method import OfflineMethod
from clusterssl.options import DataOptions, ModelOptions, OptimOptions, RunOptions, num_views
from clusterssl.pretrain import assemble, join, or_digits, prototype_net
from clusterssl.sela import SeLa, learning_rate


@dataclass(frozen=True)
class SeLaV2Options:
    """Objective."""

    crops_for_assign: tuple[int, ...] = (0, 1)
    """crops that are remembered and assigned; the prototype layers take turns with them"""
    temperature: float = 0.1
    """of the softmax over prototypes in the loss"""
    nmb_prototypes: tuple[int, ...] = (3000, 3000, 3000)
    """clusters of each head; every one has a prototype layer of its own"""
    epsilon: float = 0.05
    """smoothness of the assignment, temperature / lambda in the words of version 1, whose lambda is 25"""
    label_clusters: int = 1
    """clusters over which an image's label is spread: 1 is a hard label, more keep so many of the plan's entries"""
    freeze_prototypes_niters: int = 313
    """first steps in which the prototypes stay as they are"""


@dataclass(frozen=True)
class Config:
    version: Literal["2", "1"] = "2"
    """2: SeLa-v2; 1: SeLa of ICLR 2020, which has other flags"""
    data: DataOptions = DataOptions()
    model: ModelOptions = ModelOptions()
    selav2: SeLaV2Options = SeLaV2Options()
    transport: TransportOptions = TransportOptions()
    optim: OptimOptions = OptimOptions()
    run: RunOptions = RunOptions()

    def __post_init__(self) -> None:
        o = self.selav2
        options.require_crops(o.crops_for_assign, num_views(self.data))
        crops, heads = len(o.crops_for_assign), len(o.nmb_prototypes)
        misfit = f"--crops_for_assign names {crops} crops, --nmb_prototypes has layers for only {heads}"
        cfg.require(crops <= heads, f"{misfit}; add layers or name at most {heads} crops")
        cfg.require_numbers(o, "temperature", "epsilon", above=0)
        cfg.require_numbers(o, "nmb_prototypes", least=2)
        cfg.require_numbers(o, "freeze_prototypes_niters", least=0)
        cfg.require_numbers(o, "label_clusters", least=1, most=min(o.nmb_prototypes))


DIGITS = Config(
    "2", options.DIGITS_DATA, options.DIGITS_MODEL,
    SeLaV2Options(nmb_prototypes=(60, 60, 60), freeze_prototypes_niters=0), optim=options.DIGITS_OPTIM,
    run=RunOptions(dump_path="runs/sela_digits"),
)  # fmt: skip


class SeLaV2(OfflineMethod):
    """Labels come from optimal transport between the remembered embeddings and prototypes learned by gradient."""

    remedies = (
        "Try a smaller --epsilon, a lower --base_lr, another --nmb_prototypes or softer augmentation (--color_jitter)"
    )

    def __init__(self, model: nn.Module, config: Config, feed: Feed) -> None:
        o, views = config.selav2, num_views(config.data)
        super().__init__(model, feed, views=views, crops_for_assign=o.crops_for_assign, temperature=o.temperature)
        self.frozen_steps = o.freeze_prototypes_niters
        self.transport = TransportLabels(
            o.nmb_prototypes, feed.num_images, sharpness=1 / o.epsilon, options=config.transport,
            kept=o.label_clusters, device=feed.device,
        )  # fmt: skip

    @torch.no_grad()
    def assign(self, epoch: int, head: int, z_MD: Tensor) -> Tensor:
        """Labels [M] of largest likelihood among those of equal frequency."""
        self.net.normalize_prototypes()
        weight_KD, index_M = self.net.prototype_layers()[head].weight, self.labels.memory.index_M
        return self.transport.assign(head, z_MD, weight_KD, index_M, f"epoch {epoch}, head {head}")

    def loss(self, crops: list[Tensor], index: Tensor) -> Tensor:
        """As of all methods with fixed labels, with prototypes of unit length."""
        self.net.normalize_prototypes()
        return super().loss(crops, index)

    def cross_entropy(self, scores_HNK: Sequence[Tensor], index: Tensor) -> Tensor:
        if self.transport.kept == 1:
            return super().cross_entropy(scores_HNK, index)
        return self.transport.cross_entropy(scores_HNK, index, self.temperature)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), **self.transport.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.transport.load_state_dict(state)


def main_version_1(words: list[str]) -> None:
    config = cfg.parse(sela_flags.Config, words, description=__doc__, default=sela_flags.defaults(words))
    rate = learning_rate if config.optim.schedule == "steps" else None
    with join(config.run) as world:
        fit(assemble(
            "sela", config, world, sela_flags.Config.make_model, SeLa, multicrop=config.data.multicrop(),
            augment=config.augment(), learning_rate=rate,
        ))  # fmt: skip


def main() -> None:
    words = sela_flags.translate(sys.argv[1:])
    if sela_flags.is_version_1(words):
        return main_version_1(words)
    config = cfg.parse(Config, words, description=__doc__, default=or_digits(Config(), DIGITS, words))
    with join(config.run) as world:
        fit(assemble("selav2", config, world, prototype_net(config.selav2.nmb_prototypes), SeLaV2))


if __name__ == "__main__":
    cfg.entry(main)
