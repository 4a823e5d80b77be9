"""SeLa's iteration as published: alternate column and row factors until the row factors stop changing.

For comparison with published numbers and for a fixed number of iterations; `potentials` finds the same plan in far
fewer passes.

Shape suffixes: N images of this rank, n images of a block, K clusters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clusterssl import pulse
from clusterssl.cluster.kernel import Kernel
from clusterssl.cluster.potentials import Found

_LOOK_EVERY = 10


@torch.no_grad()
def plain_iteration(kernel: Kernel, sharpness: float, *, error: float, most: int) -> tuple[Found, int]:
    """Asano et al. 2020, algorithm 1: r = 1 / (K M^T c), c = 1 / (N M r), with M = softmax(logits)^sharpness.

    Before the first iteration c is 1/N. The change, sum over images of |c_old / c_new - 1|, is looked at after
    iterations 1, 11, 21, ... One pass over the images and one all-reduce of K + 1 numbers per iteration.

    Args:
        kernel: in float64; M underflows in float32.
        sharpness: lambda.
        error: change to end at; 0: run all iterations.
        most: iterations.

    Returns:
        The last column factors, as potentials, and the number of iterations.
    """
    kernel.tilt(sharpness, torch.zeros(kernel.clusters, dtype=torch.float64))
    c_N = torch.zeros(len(kernel.features_ND), dtype=kernel.dtype, device=kernel.device)
    factor_K: Tensor | None = None

    def columns(span: slice, kernel_nK: Tensor) -> Tensor:
        c_n = _first(kernel, kernel_nK) if factor_K is None else 1 / (kernel.images * (kernel_nK @ factor_K))
        change = (c_N[span] / c_n - 1).abs().sum()
        c_N[span] = c_n
        return torch.cat([c_n @ kernel_nK, change[None]])

    for iteration in range(most + 1):
        pulse.tick()
        packed = kernel.sums(columns, kernel.clusters + 1)
        change = float(packed[-1])
        looked = iteration == most or (iteration - 1) % _LOOK_EVERY == 0
        if factor_K is not None and looked and (change <= error or iteration == most):
            break
        tiny = torch.finfo(kernel.dtype).tiny
        factor_K = 1 / (kernel.clusters * packed[:-1].clamp(min=tiny)).to(kernel.dtype)
    assert factor_K is not None
    return Found(factor_K.double().log().cpu(), change, float("nan")), iteration


def _first(kernel: Kernel, kernel_nK: Tensor) -> Tensor:
    """c = 1/N for M, as a factor of the kernel, whose rows are divided by their largest entries, not their sums."""
    log_sum_n = kernel_nK.pow(1 / kernel.sharpness).sum(1).log()
    return (-kernel.sharpness * log_sum_n).exp() / kernel.images
