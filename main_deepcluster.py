"""DeepCluster: cluster the features of all images, learn the clusters as classes, begin anew.

Caron et al. 2018, https://arxiv.org/abs/1807.05520

    python main_deepcluster.py                                               # built-in digits, CPU or GPU
    python main_deepcluster.py --data_path photos --arch resnet50 --sobel    # your images, one process
    torchrun --nproc_per_node=8 main_deepcluster.py --data_path /imagenet/train
    python main_deepcluster.py /imagenet/train --exp runs/mine --arch alexnet --lr 0.05 --wd -5 --k 10000 --sobel

Shape suffixes: B images, F features.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))
import clusterssl.early  # noqa: F401

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clusterssl import config as cfg
from clusterssl import dist, options
from clusterssl.checkpoint import bare
from clusterssl.cluster.kmeans import KMeansOptions
from clusterssl.cluster.offline import multi_head_cross_entropy
from clusterssl.cluster.roundlog import record_round
from clusterssl.cluster.rounds import ClusteringOptions, ClusterLabels, Ints
from clusterssl.data import Augment
from clusterssl.engine import fit
from clusterssl.feed import Feed
from clusterssl.method import Method
from clusterssl.models.build import resolve_stem
from clusterssl.models.headed import HeadedNet, build_headed
from clusterssl.models.published import published_arch
from clusterssl.monitor import Observation
from clusterssl.options import DataOptions, OptimOptions, RunOptions, TrunkOptions
from clusterssl.pretrain import assemble, join, or_digits

ALIASES = {
    "a": "arch", "k": "nmb_cluster", "lr": "base_lr", "batch": "batch_size", "exp": "dump_path", "resume": "init",
    "start_epoch": None, "checkpoints": None, "verbose": None,
}  # fmt: skip
"""published flags; runs here resume by themselves, write all they have to say and save by the clock"""


@dataclass(frozen=True)
class Config:
    """--arch alexnet and vgg16 are the published networks with BatchNorm."""

    sobel: bool = False
    """let the network see edges instead of colours"""
    data: DataOptions = DataOptions(
        nmb_crops=(1,), min_scale_crops=(0.08,), color_jitter_p=0.0, gray_p=0.0, blur_p=0.0, workers=4
    )
    model: TrunkOptions = TrunkOptions(arch="alexnet")
    clustering: ClusteringOptions = ClusteringOptions()
    kmeans: KMeansOptions = KMeansOptions(kmeans_iters=20)
    optim: OptimOptions = OptimOptions(
        200, 256, optimizer="sgd", base_lr=0.05, wd=1e-5, warmup_epochs=0, schedule="constant"
    )
    run: RunOptions = RunOptions()


DIGITS = Config(
    data=replace(options.DIGITS_DATA, nmb_crops=(1,)), model=options.DIGITS_TRUNK,
    clustering=ClusteringOptions(nmb_cluster=30, pca_dim=16, reassign=4.0), kmeans=KMeansOptions(kmeans_iters=20),
    optim=OptimOptions(20, 100, optimizer="sgd", base_lr=0.5, wd=1e-5, warmup_epochs=0, schedule="constant"),
    run=RunOptions(dump_path="runs/deepcluster_digits"),
)  # fmt: skip


class DeepCluster(Method):
    """The clusters of all images are the classes of the next epoch; the top layer begins anew each time."""

    remedies = "Try a lower --base_lr, another --nmb_cluster or stronger augmentation (smaller --min_scale_crops)"

    def __init__(self, model: nn.Module, config: Config, feed: Feed) -> None:
        self.model, self.net, self.feed, self.folder = model, cast(HeadedNet, bare(model)), feed, config.run.dump_path
        sizes = {"num_images": feed.num_images, "feature_dim": self.net.feature_dim}
        self.clusters = ClusterLabels(config.clustering, config.kmeans, **sizes, seed=feed.seed, device=feed.device)
        self.top_layer = self.net.heads()[0].requires_grad_(True)

    def begin_epoch(self, epoch: int) -> None:
        """Cluster the images, then start with a top layer that knows nothing (section 3.2)."""
        self.net.eval()
        found = self.clusters.find(self.features, self.feed.plain(), epoch)
        if dist.rank() == 0:
            record_round(Path(self.folder), epoch, found, self.clusters.labels_N, self.feed.labels)
        self.clusters.labels_N = found.labels_N
        self.net.set_heads([found.number], torch.Generator().manual_seed(self.feed.seed * 1_000_003 + epoch))
        for parameter in self.top_layer.parameters():
            self.optimizer.state.pop(parameter, None)

    def features(self, images: Tensor) -> Tensor:
        with self.feed.autocast():
            return self.net.features([images])

    def order(self, epoch: int) -> Ints:
        return self.clusters.order(epoch)

    def loss(self, crops: list[Tensor], index: Tensor) -> Tensor:
        """Cross-entropy with the clusters, equation 2."""
        features_BF, scores = self.model(crops)
        seen_BF = F.normalize(features_BF[:, :256].detach().float())  # enough to see a collapse, and much cheaper
        self.seen = Observation(seen_BF, scores[0].detach(), None)
        return multi_head_cross_entropy(scores, self.clusters.of(index)[None])

    def before_step(self, step: int) -> None:
        for parameter in self.top_layer.parameters():
            dist.all_reduce_(cast(Tensor, parameter.grad), "mean")

    def state_dict(self) -> dict[str, Any]:
        return self.clusters.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.clusters.load_state_dict(state)


def make_model(config: Config) -> HeadedNet:
    stem = resolve_stem(config.model.stem, max(max(size) for size in config.data.size_crops))
    arch = published_arch("deepcluster", config.model.arch, config.sobel)
    net = build_headed(arch, stem, [config.clustering.nmb_cluster], relu_before_heads=True, head_std=0.01)
    net.heads()[0].requires_grad_(False)  # DistributedDataParallel, made next, cannot follow a layer of changing size
    return net


def parameter_groups(net: Any, config: Config) -> list[dict[str, Any]]:
    return [{"params": net.backbone.parameters()}, {"params": net.heads()[0].parameters(), "momentum": 0.0}]


def main() -> None:
    words = cfg.translate(sys.argv[1:], ALIASES, positional="data_path", powers=["wd"])
    config = cfg.parse(Config, words, description=__doc__, default=or_digits(Config(), DIGITS, words))
    with join(config.run) as world:
        fit(assemble(
            "deepcluster", config, world, make_model, DeepCluster, augment=Augment(std=(0.229, 0.224, 0.225)),
            parameter_groups=parameter_groups, images_per_epoch=lambda config, n: config.clustering.images_per_epoch(n),
        ))  # fmt: skip


if __name__ == "__main__":
    cfg.entry(main)
