"""What methods need between two epochs, when they look at all images; computed, as it cannot be rehearsed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from clusterssl.cluster import kmeans, transport
from clusterssl.cluster.rounds import ClusterLabels
from clusterssl.offline_method import OfflineMethod
from clusterssl.sela import SeLa


class Between(NamedTuple):
    """Bytes of one rank."""

    what: str
    device: int = 0
    """in the memory where it computes, beside what lives there all the time"""
    host: int = 0
    """in the memory of the machine"""
    sent: int = 0
    """contributed to all-reduces of one renewal of all labels"""
    each_pass: int = 0
    """and of each pass of an optimal transport, whose number the data decide"""


def between_epochs(method: Any, config: Any, ranks: int, *, gpu: bool) -> Between | None:
    """Of a method that labels all images at once; None of others."""
    device = torch.device("cuda" if gpu else "cpu")
    if isinstance(method, OfflineMethod):
        return _from_memory(method, config, device)
    if isinstance(method, SeLa):
        return _sela(method, config, ranks, gpu)
    clusters = getattr(method, "clusters", None)
    if isinstance(clusters, ClusterLabels):
        return _rounds(clusters, ranks, device)
    return None


def _from_memory(method: OfflineMethod, config: Any, device: torch.device) -> Between:
    rows, heads = len(method.labels.memory.index_M), [layer.out_features for layer in method.net.prototype_layers()]
    dim, table = method.net.prototype_layers()[0].in_features, 8 * method.labels.table_HN.numel()
    if hasattr(config, "kmeans"):
        iterations = config.kmeans.kmeans_iters
        sums = sum(8 * (k + 1) * (iterations * (dim + 1) + 1) for k in heads)
        needed = kmeans.memory_estimate(rows, dim, max(heads), device, config.kmeans.kmeans_init)
        return Between("k-means of the memory bank", needed, 0, sums + table)
    needed = transport.memory_estimate(rows, max(heads), dim, config.transport.transport_cache_gb)
    return Between("optimal transport of the memory bank", needed, 0, table, 8 * max(heads))


def _sela(method: SeLa, config: Any, ranks: int, gpu: bool) -> Between:
    rows, dim, heads, k = -(-method.feed.num_images // ranks), method.net.feature_dim, config.sela.hc, config.sela.ncl
    features = 4 * rows * dim
    needed = transport.memory_estimate(rows, k, dim, config.transport.transport_cache_gb) - features
    device, host = (needed, features) if gpu else (0, features + needed)
    sent = 8 * heads * method.feed.num_images
    return Between("optimal transport of all features", device, host, sent, each_pass=8 * k)


def _rounds(clusters: ClusterLabels, ranks: int, device: torch.device) -> Between:
    images, k = len(clusters.labels_N), clusters.options.nmb_cluster
    rows, dim = -(-images // ranks), clusters.options.usable_dim(images, clusters.feature_dim)
    needed = 4 * rows * dim
    if clusters.options.clustering == "Kmeans":
        needed += kmeans.memory_estimate(rows, dim, k, device, clusters.kmeans.kmeans_init)
    sent = 8 * (clusters.feature_dim + 1) ** 2 + 8 * (k + 1) * (clusters.kmeans.kmeans_iters * (dim + 1) + 1)
    return Between("clustering of all features", needed, 4 * rows * clusters.feature_dim, sent)
