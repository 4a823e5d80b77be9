"""DeepCluster-v2: cluster the embeddings of the last epoch, learn the clusters as classes, for several clusterings.

Caron et al. 2020, https://arxiv.org/abs/2006.09882, section 5.1 and appendix D

    python main_deepclusterv2.py                                                     # built-in digits, CPU or GPU
    python main_deepclusterv2.py --data_path /imagenet/train --dump_path runs/mine   # your images, one process
    torchrun --nproc_per_node=8 main_deepclusterv2.py --data_path /imagenet/train    # one node
    sbatch scripts/deepclusterv2_400ep_pretrain.sh                                   # many nodes

Shape suffixes: B images, V views, A assigned views, N = V * B rows, M slots of the memory, D feature dimension,
H heads, K prototypes of a head.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

import torch
from torch import Tensor, nn

from clusterssl import config as cfg
from clusterssl import options
from clusterssl.checkpoint import bare
from clusterssl.cluster.kmeans import KMeansOptions, spherical_kmeans
from clusterssl.cluster.memory import MemoryBank
from clusterssl.cluster.offline import OfflineLabels, multi_head_cross_entropy
from clusterssl.engine import fit
from clusterssl.feed import Feed
from clusterssl.method import Method
from clusterssl.monitor import Observation
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
        misfit = f"--crops_for_assign names {crops} crops, --nmb_prototypes {heads} layers that cluster one each"
        cfg.require(crops <= heads, f"{misfit}; name at most {heads}")
        cfg.require(o.temperature > 0, f"--temperature {o.temperature}: must be positive")
        cfg.require(min(o.nmb_prototypes) > 1, "--nmb_prototypes: must be at least 2 each")


DIGITS = Config(
    options.DIGITS_DATA, options.DIGITS_MODEL, DeepClusterV2Options(nmb_prototypes=(60, 60, 60)),
    optim=options.DIGITS_OPTIM, run=RunOptions(dump_path="runs/deepclusterv2_digits"),
)  # fmt: skip


class DeepClusterV2(Method):
    """Prototypes and labels come from k-means on a memory of embeddings; the network learns to predict the labels."""

    remedies = "Try a lower --base_lr, another --nmb_prototypes or softer augmentation (--color_jitter)"

    def __init__(self, model: nn.Module, config: Config, feed: Feed) -> None:
        o = self.options = config.deepclusterv2
        self.model, self.net, self.feed, self.kmeans = model, bare(model), feed, config.kmeans
        self.views, self.assigned = num_views(config.data), list(o.crops_for_assign)
        images, most = feed.steps_per_epoch * feed.global_batch, max(o.nmb_prototypes)
        cfg.require(most <= images, f"--nmb_prototypes {most}: there are only {images} images in an epoch to cluster")
        dim = self.net.prototype_layers()[0].in_features
        memory = MemoryBank(len(self.assigned), feed.steps_per_epoch, feed.step_images, dim, feed.device)
        self.labels = OfflineLabels(len(o.nmb_prototypes), feed.num_images, memory)

    def begin_epoch(self, epoch: int) -> None:
        """Assignment phase: cluster the embeddings that the last epoch left behind; before the first, compute them."""
        if not self.labels.memory.filled:
            self.model.train()
            self.labels.memory.fill(self.embed, self.feed.augmented(0))
        self.labels.renew(partial(self.cluster, epoch))

    @torch.no_grad()
    def embed(self, crops: list[Tensor]) -> Tensor:
        """Embeddings [A, B, D] of the assigned crops, each of which is a batch of its own."""
        with self.feed.autocast():
            return torch.stack([self.net([crops[a]])[0] for a in self.assigned])

    @torch.no_grad()
    def cluster(self, epoch: int, head: int, z_MD: Tensor) -> Tensor:
        """Spherical k-means for one head: its centroids become the prototypes, the labels [M] are returned."""
        layer, heads = self.net.prototype_layers()[head], len(self.options.nmb_prototypes)
        found = spherical_kmeans(
            z_MD, layer.out_features, self.kmeans, seed=self.feed.seed, draw=epoch * heads + head,
            ids_N=self.labels.memory.slots(),
        )  # fmt: skip
        layer.weight.copy_(found.centroids_KD)
        return found.labels_N

    def loss(self, crops: list[Tensor], index: Tensor) -> Tensor:
        """Cross-entropy of all crops with the labels of their images; the embeddings replace those in the memory."""
        z_ND, scores_HNK = self.model(crops)
        z_ABD = self.of_assigned(z_ND.detach())
        self.labels.memory.write(z_ABD, index)
        self.seen = Observation(z_ABD.flatten(0, 1), self.of_assigned(scores_HNK[0].detach()).flatten(0, 1), None)
        return multi_head_cross_entropy(scores_HNK, self.labels.of(index), self.options.temperature)

    def of_assigned(self, rows_NX: Tensor) -> Tensor:
        """Rows of the assigned views, [A, B, X]."""
        return rows_NX.unflatten(0, (self.views, -1))[self.assigned]

    def before_step(self, step: int) -> None:
        if step < self.options.freeze_prototypes_niters:
            for layer in self.net.prototype_layers():
                layer.weight.grad = None

    def state_dict(self) -> dict[str, Any]:
        return self.labels.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.labels.load_state_dict(state)


def main() -> None:
    config = cfg.parse(Config, description=__doc__, default=or_digits(Config(), DIGITS))
    with join(config.run) as world:
        fit(assemble("deepclusterv2", config, world, prototype_net(config.deepclusterv2.nmb_prototypes), DeepClusterV2))


if __name__ == "__main__":
    cfg.entry(main)
