"""Labels of all images under the constraint that all clusters are equally large: SeLa and SeLa-v2.

SeLa (Asano et al. 2020, arXiv 1911.05371, equations 6 to 8): the plan Q maximises sum Q * log P plus entropy / lambda
among the matrices whose rows sum to 1/N and columns to 1/K; Q_nk = c_n M_nk r_k with M = P^lambda, and the label of
image n is the largest entry of its row. SeLa-v2 (Caron et al. 2020, arXiv 2006.09882, appendix D) has the kernel
exp(z c / epsilon). Factors of rows cancel, so both are exp(sharpness * logits), with sharpness lambda or 1 / epsilon.

The plan is found by a quasi-Newton method (`potentials`) in float32, over blocks of the kernel (`kernel`): N x K
numbers are never held, and any number of ranks gives what one rank gives. The published iteration is kept as a choice.

Shape suffixes: N images of this rank, n images of a block, D features, K clusters, H heads, J entries of a
row.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clusterssl import dist
from clusterssl.cluster.kernel import Kernel, kernel_bytes
from clusterssl.cluster.plain_iteration import plain_iteration
from clusterssl.cluster.potentials import Found, quasi_newton
from clusterssl.cluster.rounding import equal_sizes
from clusterssl.config import require_numbers
from clusterssl.rng import Stream, permutation

logger = logging.getLogger(__name__)

_LADDER = (1 / 8, 1 / 3)
"""of the sharpness, lambda 3 and 8 on the way to 25"""
_FAR = 0.5
"""error per image from which on a start is so bad that the ladder pays"""
_ROUGH = 0.1
"""error per image at which a rung of the ladder ends"""
_SMALL = 2**20
"""entries of the kernel up to which float64 costs nothing that matters"""
_FLOOR = 1e-7
"""error per image that float32 can tell from zero"""
_PATIENCE = 200
"""passes in float32 before float64 takes over"""
_FEW = 10_000
"""images below which --sinkhorn_tol is lowered in proportion: it is a sum over images, and labels shall be exact"""
_IMBALANCE = 0.01
"""largest deviation of a cluster's share of the plan from 1 / K that counts as converged, as a fraction of it"""

_WORTH_TELLING = 10.0
"""seconds after which the end of a transport is told on the screen, too"""


@dataclass(frozen=True)
class TransportOptions:
    """Optimal transport."""

    sinkhorn_tol: float = 0.1
    """stop when the row factors of all images together change by no more than this (CIFAR: 0.01)"""
    sinkhorn_max_iterations: int = 2000
    """passes over the images after which the plan is taken as it is, with a warning"""
    sinkhorn_solver: Literal["quasi-newton", "published"] = "quasi-newton"
    """published: SeLa's iteration in float64; the same labels, ten to a hundred times as many passes"""
    sinkhorn_iterations: int = 0
    """run so many published iterations instead of until --sinkhorn_tol; 0: do not"""
    equal_labels: bool = False
    """move the images with the least to lose until all clusters are equally large, to one image"""
    transport_cache_gb: float = 0.5
    """a kernel of N x K numbers is kept between passes when it is no larger than this on each rank, or on a CPU than
    the features"""

    def __post_init__(self) -> None:
        require_numbers(self, "sinkhorn_tol", above=0)
        require_numbers(self, "sinkhorn_max_iterations", least=1)
        require_numbers(self, "sinkhorn_iterations", "transport_cache_gb", least=0)


class Plan(NamedTuple):
    """What the optimal transport found."""

    labels_N: Tensor
    """of this rank's images, int64"""
    potentials_K: Tensor
    """log r, float64 on the CPU, the same on every rank"""
    passes: int
    """over the images, label pass included"""
    iterations: int
    """of the published rule; 0 with the quasi-Newton method"""
    error: float
    """sum over images of |c_old / c_new - 1| at the end; with the quasi-Newton method an upper bound of it"""
    imbalance: float
    """largest deviation of a cluster from N / K in the plan, as a fraction of N / K; nan with the published rule"""
    converged: bool
    """whether the tolerance was met"""
    clusters_NJ: Tensor
    """with the `kept` largest entries of each row of the plan, int64"""
    weights_NJ: Tensor
    """those entries, divided by their sum"""


@torch.no_grad()
def transport(
    features_ND: Tensor,
    weight_KD: Tensor | None = None,
    bias_K: Tensor | None = None,
    *,
    sharpness: float,
    options: TransportOptions | None = None,
    start_K: Tensor | None = None,
    dtype: torch.dtype | None = None,
    kept: int = 0,
    name: str = "optimal transport",
) -> Plan:
    """Label this rank's images so that the images of all ranks fall into K equal clusters; a collective call.

    Args:
        features_ND: any float type; ranks may hold different numbers of images, or none. They may lie on the CPU while
            the head is on a GPU.
        weight_KD: logits are features_ND @ weight_KD.T + bias_K; None: the features are the logits.
        bias_K: None for zeros.
        sharpness: lambda of SeLa, 1 / epsilon of SeLa-v2.
        options: the flags.
        start_K: potentials to begin with, such as those of the labels before; the plan does not depend on them.
        dtype: of the kernel; None: float32, float64 for small problems and for the published rule.
        kept: J, entries of each row of the plan to return beside the labels; at most K.
        name: for the log.

    Raises:
        UserError: fewer images than clusters, or features that are not finite.
    """
    options, began = options or TransportOptions(), time.monotonic()
    published = options.sinkhorn_solver == "published" or options.sinkhorn_iterations > 0
    clusters = features_ND.shape[1] if weight_KD is None else len(weight_KD)
    images = int(dist.all_reduce_(torch.tensor(len(features_ND))))
    exact = published or images * clusters <= _SMALL
    dtype = dtype or (torch.float64 if exact else torch.float32)
    _foretell(images, clusters, features_ND.shape[1], options.transport_cache_gb, dtype.itemsize)
    kernel = Kernel(features_ND, weight_KD, bias_K, dtype=dtype, cache_bytes=options.transport_cache_gb * 1e9)
    if published:
        fixed = options.sinkhorn_iterations
        error, most = (0.0, fixed) if fixed else (options.sinkhorn_tol, options.sinkhorn_max_iterations)
        found, iterations = plain_iteration(kernel, sharpness, error=error, most=most)
        converged = found.error <= error
    else:
        kernel, found = _quasi_newton(kernel, sharpness, options, start_K)
        iterations, converged = 0, _met(kernel, found, options)
    labels_N = kernel.labels(found.potentials_K)
    if options.equal_labels:
        labels_N = equal_sizes(kernel, found.potentials_K, labels_N)
    soft = kernel.largest(found.potentials_K, kept)
    plan = Plan(labels_N, found.potentials_K, kernel.passes, iterations, found.error, found.imbalance, converged, *soft)
    _tell(kernel, plan, options, name, time.monotonic() - began)
    return plan


def memory_estimate(images: int, clusters: int, dim: int, cache_gb: float = 0.5, number_bytes: int = 4) -> int:
    """Bytes on one rank for labelling `images` of its own on a CPU, its features and labels included.

    features N D + head K D + two blocks + the kernel N K if it is no larger than the cache or than the features +
    labels 8 N.
    """
    features, head = number_bytes * images * dim, number_bytes * clusters * dim
    kernel = kernel_bytes(images, clusters, max(cache_gb * 1e9, features), number_bytes)
    return features + head + kernel + 8 * images


def equal_labels(seed: int, images: int, clusters: int, heads: int) -> Tensor:
    """Shuffled labels of equal frequency to begin with, int32 [H, N]; the same on every rank."""
    orders = [permutation(seed, Stream.LABELS, head, images) for head in range(heads)]
    return torch.from_numpy(np.stack([dealt(order_N, clusters) for order_N in orders]))


def dealt(order_N: NDArray[np.int64], clusters: int) -> NDArray[np.int32]:
    """Labels 0 .. K-1 dealt round and round, then put into this order."""
    return (order_N % clusters).astype(np.int32)


def _quasi_newton(
    kernel: Kernel, sharpness: float, options: TransportOptions, start_K: Tensor | None
) -> tuple[Kernel, Found]:
    """Potentials, from a bad start by way of smaller sharpness, where a potential counts for less.

    Returns the kernel, too, because one in float64 takes over where float32's rounding stands in the way.
    """
    potentials_K = torch.zeros(kernel.clusters, dtype=torch.float64) if start_K is None else start_K.double().cpu()
    most = options.sinkhorn_max_iterations
    kernel.tilt(sharpness, potentials_K)
    if float((kernel.shares(potentials_K) - 1 / kernel.clusters).abs().sum()) > _FAR:
        at = 1.0
        for fraction in _LADDER:
            potentials_K, at = potentials_K * (fraction / at), fraction
            kernel.tilt(fraction * sharpness, potentials_K)
            rough = _ROUGH * kernel.images
            potentials_K = quasi_newton(kernel, potentials_K, rough, float("inf"), passes=most).potentials_K
        potentials_K = potentials_K / at
        kernel.tilt(sharpness, potentials_K)
    goal = _tolerance(kernel, options), _IMBALANCE
    single = kernel.dtype == torch.float32
    found = quasi_newton(kernel, potentials_K, *goal, passes=min(most, kernel.passes + _PATIENCE) if single else most)
    if single and not _met(kernel, found, options) and kernel.passes < most:
        kernel = kernel.in_double()
        kernel.tilt(sharpness, found.potentials_K)
        found = quasi_newton(kernel, found.potentials_K, *goal, passes=most)
    return kernel, found


def _tolerance(kernel: Kernel, options: TransportOptions) -> float:
    return max(options.sinkhorn_tol * min(1, kernel.images / _FEW), _FLOOR * kernel.images)


def _met(kernel: Kernel, found: Found, options: TransportOptions) -> bool:
    return found.error <= _tolerance(kernel, options) and found.imbalance <= _IMBALANCE


@functools.cache
def _foretell(images: int, clusters: int, dim: int, cache_gb: float, number_bytes: int) -> None:
    """Once for each problem: most are solved many times."""
    if dist.rank() == 0:
        mine = -(-images // dist.size())
        needed = memory_estimate(mine, clusters, dim, cache_gb, number_bytes) / 2**20
        logger.info(
            "optimal transport of %d x %d features to %d clusters: up to %.0f MiB on each rank, features included",
            images, dim, clusters, needed,
        )  # fmt: skip


def _tell(kernel: Kernel, plan: Plan, options: TransportOptions, name: str, seconds: float) -> None:
    if dist.rank():
        return
    logger.info(
        "%s: %d images in %d clusters, %d passes, %.1f s, change %.2g",
        name, kernel.images, kernel.clusters, plan.passes, seconds, plan.error,
        extra={"file_only": seconds < _WORTH_TELLING},
    )  # fmt: skip
    if options.sinkhorn_iterations == 0 and not plan.converged:
        largest = "" if math.isnan(plan.imbalance) else f", the largest cluster error at {100 * plan.imbalance:.2g} %"
        logger.warning(
            "%s: stopped after %d passes at a change of %.3g (--sinkhorn_tol %g)%s: the clusters are less equal than "
            "asked for; raise --sinkhorn_max_iterations, now %d, or --sinkhorn_tol",
            name, plan.passes, plan.error, options.sinkhorn_tol, largest, options.sinkhorn_max_iterations,
        )  # fmt: skip
