"""Rounds of DeepCluster: the features of all images become clusters, which are the classes until the next round.

Caron et al. 2018, https://arxiv.org/abs/1807.05520, sections 3.2 and 4.1.

Shape suffixes: N images of the dataset, M those of this rank, B images of a batch, F features, P components.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clusterssl import dist
from clusterssl.cluster.balanced import as_published, balanced_order
from clusterssl.cluster.kmeans import KMeansOptions, euclidean_kmeans
from clusterssl.cluster.pca import whiten
from clusterssl.cluster.power_iteration import power_iteration_clustering
from clusterssl.config import require, require_numbers

logger = logging.getLogger(__name__)

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class ClusteringOptions:
    """Clustering."""

    clustering: Literal["Kmeans", "PIC"] = "Kmeans"
    """k-means, or power iteration clustering, which finds the number of clusters by itself"""
    nmb_cluster: int = 10000
    """clusters of k-means"""
    pca_dim: int = 256
    """components to which the features are reduced; fewer where there are not as many features or images"""
    pic_neighbours: int = 5
    """of each image in the graph of PIC"""
    pic_sigma: float = 0.2
    """width of the kernel that weighs the neighbours in PIC"""
    reassign: float = 1.0
    """images trained on between two rounds of clustering, as a fraction of all"""
    published_sampler: bool = False
    """visit the images that the published loop visits, which are not balanced over clusters"""

    def __post_init__(self) -> None:
        require_numbers(self, "nmb_cluster", least=2)
        require_numbers(self, "pca_dim", "pic_neighbours", "pic_sigma", "reassign", above=0)

    def images_per_epoch(self, num_images: int) -> int:
        """Images that are visited between two rounds."""
        return int(self.reassign * num_images)

    def usable_dim(self, num_images: int, feature_dim: int) -> int:
        """Components for so many images and features.

        Raises:
            UserError: there are too few images for the clusters or neighbours asked for.
        """
        k, neighbours = self.nmb_cluster, self.pic_neighbours
        if self.clustering == "PIC":
            few = f"--pic_neighbours {neighbours}: needs more than {neighbours} images, there are {num_images}"
            require(neighbours < num_images, few)
        else:
            require(k <= num_images, f"--nmb_cluster {k}: more clusters than the {num_images} images; ask for fewer")
        return min(self.pca_dim, feature_dim, num_images - 1)


class Round(NamedTuple):
    """Clusters of all images."""

    labels_N: Tensor
    """int32, the same on every rank"""
    number: int
    """of clusters, empty ones included"""
    loss: float
    """sum of the squared distances to the centroids; 0 for PIC"""


def cluster_features(
    x_MF: Tensor, options: ClusteringOptions, kmeans: KMeansOptions, device: torch.device, seed: int, epoch: int
) -> Round:
    """Reduce, whiten and scale the features of the images of all ranks to unit length, and cluster them.

    Args:
        x_MF: this rank's images; the rows of all ranks in rank order are the dataset.
        options: how.
        kmeans: how with k-means.
        device: where to compute.
        seed: of the run.
        epoch: that will learn these clusters.

    Raises:
        UserError: too few images, or features that are not finite or all equal.
    """
    images = int(dist.all_reduce_(torch.tensor(len(x_MF))))
    x_MP = whiten(x_MF, options.usable_dim(images, x_MF.shape[1]), device)
    if options.clustering == "PIC":
        labels_N = power_iteration_clustering(x_MP, neighbours=options.pic_neighbours, sigma=options.pic_sigma)
        return Round(labels_N.int(), int(labels_N.max()) + 1, 0.0)
    found = euclidean_kmeans(x_MP, options.nmb_cluster, kmeans, seed=seed, draw=epoch)
    return Round(dist.all_gather_cat(found.labels_N.int()), options.nmb_cluster, found.inertia[-1])


class ClusterLabels:
    """The cluster of every image, renewed in rounds."""

    def __init__(
        self,
        options: ClusteringOptions,
        kmeans: KMeansOptions,
        *,
        num_images: int,
        feature_dim: int,
        seed: int,
        device: torch.device,
    ) -> None:
        """Start without clusters.

        Raises:
            UserError: there are too few images for the clusters or neighbours asked for.
        """
        self.options, self.kmeans, self.feature_dim, self.seed = options, kmeans, feature_dim, seed
        self.labels_N = torch.full((num_images,), -1, dtype=torch.int32, device=device)
        dim = options.usable_dim(num_images, feature_dim)
        held = -(-num_images // dist.size()) * feature_dim * 4 / 2**20
        if dist.rank() == 0:
            logger.info(
                "clustering %d components (--pca_dim %d) of %d features; these take %.1f MiB on each rank",
                dim, options.pca_dim, feature_dim, held,
            )  # fmt: skip

    @torch.no_grad()
    def find(self, features: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]], epoch: int) -> Round:
        """Cluster all images; a collective call that changes nothing here. Memory: the features of this rank's share.

        Args:
            features: from images B x 3 x h x w to B x F.
            batches: images and dataset positions of this rank's `dist.share`, in order (`Feed.plain`).
            epoch: that will learn the clusters.

        Raises:
            UserError: features are not finite or all equal.
        """
        first, end = dist.share(len(self.labels_N))
        x_MF = torch.empty(0, self.feature_dim)
        for images, index_B in batches:
            x_BF = features(images)
            if len(x_MF) == 0:  # in the memory of the CPU, as it may be much larger than a GPU's
                x_MF = torch.empty(end - first, self.feature_dim, dtype=torch.promote_types(x_BF.dtype, torch.float32))
            x_MF[index_B.cpu() - first] = x_BF.to(x_MF)
        return cluster_features(x_MF, self.options, self.kmeans, self.labels_N.device, self.seed, epoch)

    def order(self, epoch: int) -> Ints:
        """Dataset positions of an epoch, see `balanced_order`."""
        labels_N = self.labels_N.cpu().numpy()
        order = balanced_order(labels_N, self.options.images_per_epoch(len(labels_N)), self.seed, epoch)
        return as_published(order, labels_N) if self.options.published_sampler else order

    def of(self, index_B: Tensor) -> Tensor:
        """Clusters of the images at these dataset positions, int64 [B]."""
        return self.labels_N[index_B].long()

    def state_dict(self) -> dict[str, Any]:
        """Clusters of all images."""
        return {"labels": self.labels_N}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.labels_N = state["labels"].to(self.labels_N)
