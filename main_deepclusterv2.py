"""DeepCluster-v2: cluster the embeddings of the last epoch, learn the clusters as classes, for several clusterings.

Caron et al. 2020, https://arxiv.org/abs/2006.09882, section 5.1 and appendix D

    python main_deepclusterv2.py                                                     # built-in digits, CPU or GPU
    python main_deepclusterv2.py --data_path /imagenet/train --dump_path runs/mine   # your images, one process
    torchrun --nproc_per_node=8 main_deepclusterv2.py --data_path /imagenet/train    # one node
    sbatch scripts/deepclusterv2_400ep_pretrain.sh                                   # many nodes

Shape suffixes: M slots of the memory, D feature dimension.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))
import clusterssl.early  # noqa: F401

import torch
from torch import Tensor, nn

from clusterssl import config as cfg
from clusterssl import options
from clusterssl.cluster.kmeans import KMeansOptions, spherical_kmeans
from clusterssl.engine import fit
from clusterssl.feed import Feed
from clusterssl.offline_method import OfflineMethod
from clusterssl.options import DataOptions, ModelOptions, OptimOptions, RunOptions, num_views
from clusterssl.pretrain import assemble, join, or_digits, prototype_net


@dataclass(frozen=True)
class DeepClusterV2Options:
    """Objective."""

    crops_for_assign: tuple[int, ...] = (0, 1)
    """crops that are remembered and clustered; the prototype layers take turns with them"""
    temperature: float = 0.1
    """of the softmax over prototypes in the loss"""
    nmb_prototypes: tuple[int, ...] = (3000, 3000, 3000)
    """clusters of each clustering; every one has a prototype layer of its own"""
    freeze_prototypes_niters: int = 10**10
    """first steps in which the prototypes stay the centroids that they are set to at the start of an epoch"""


@dataclass(frozen=True)
class Config:
    data: DataOptions = DataOptions()
    model: ModelOptions = ModelOptions()
    deepclusterv2: DeepClusterV2Options = DeepClusterV2Options()
    kmeans: KMeansOptions = KMeansOptions()
    optim: OptimOptions = OptimOptions()
    run: RunOptions = RunOptions()

    def __post_init__(self) -> None:
        o = self.deepclusterv2
        options.require_crops(o.crops_for_assign, num_views(self.data))
        crops, heads = len(o.crops_for_assign), len(o.nmb_prototypes)
        misfit = f"--crops_for_assign names {crops} crops, --nmb_prototypes has layers for only {heads}"
        cfg.require(crops <= heads, f"{misfit}; add layers or name at most {heads} crops")
        cfg.require_numbers(o, "temperature", above=0)
        cfg.require_numbers(o, "nmb_prototypes", least=2)
        cfg.require_numbers(o, "freeze_prototypes_niters", least=0)


DIGITS = Config(
    options.DIGITS_DATA, options.DIGITS_MODEL, DeepClusterV2Options(nmb_prototypes=(60, 60, 60)),
    optim=options.DIGITS_OPTIM, run=RunOptions(dump_path="runs/deepclusterv2_digits"),
)  # fmt: skip


class DeepClusterV2(OfflineMethod):
    """Prototypes and labels come from k-means on a memory of embeddings; the network learns to predict the labels."""

    remedies = "Try a lower --base_lr, another --nmb_prototypes or softer augmentation (--color_jitter)"

    def __init__(self, model: nn.Module, config: Config, feed: Feed) -> None:
        o, self.kmeans, views = config.deepclusterv2, config.kmeans, num_views(config.data)
        self.frozen_steps = o.freeze_prototypes_niters
        super().__init__(model, feed, views=views, crops_for_assign=o.crops_for_assign, temperature=o.temperature)

    @torch.no_grad()
    def assign(self, epoch: int, head: int, z_MD: Tensor) -> Tensor:
        """Spherical k-means for one head: its centroids become the prototypes, the labels [M] are returned."""
        layers = self.net.prototype_layers()
        found = spherical_kmeans(
            z_MD, layers[head].out_features, self.kmeans, seed=self.feed.seed, draw=epoch * len(layers) + head,
            ids_N=self.labels.memory.slots(),
        )  # fmt: skip
        layers[head].weight.copy_(found.centroids_KD)
        return found.labels_N

    def before_step(self, step: int) -> None:
        if step < self.frozen_steps:
            for layer in self.net.prototype_layers():
                layer.weight.grad = None


def main() -> None:
    config = cfg.parse(Config, description=__doc__, default=or_digits(Config(), DIGITS))
    with join(config.run) as world:
        fit(assemble("deepclusterv2", config, world, prototype_net(config.deepclusterv2.nmb_prototypes), DeepClusterV2))


if __name__ == "__main__":
    cfg.entry(main)
