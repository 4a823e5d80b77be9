"""Sinkhorn-Knopp: soft assignments of images to prototypes under the constraint that all prototypes are used equally.

SwAV (Caron et al. 2020, arXiv 2006.09882), equations 3 to 5, after Cuturi 2013. The plan is kept as diag(v) P diag(u)
with P = exp((scores - shift) / epsilon) computed once, so that an iteration is two matrix-vector products and one
all-reduce of a K-vector, and no N x K matrix is rewritten. On a CPU both products are taken block of rows by block of
rows, while the block is in the cache, and of several problems that no other rank waits for one is finished before the
next; exponentials are powers of two, which cost a third of those of e there. On a GPU each pass is one kernel.

Shape suffixes: A problems at once, N images of this rank, n images of a block, K prototypes.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from clusterssl import dist
from clusterssl.gpu import for_kernels

# Largest (max - min score) / epsilon for which exp() in float32 keeps every entry of P a normal number, with room for
# the products with u and v; beyond it the log domain is used.
_SCALING_LIMIT = {torch.float32: 70.0, torch.float64: 600.0}
_CACHED_ELEMENTS = 2**20
# Each iteration multiplies v by about N / K and divides u by it: so many keep both in range for N / K up to 10^5.
_ITERATIONS_IN_RANGE = 4


@torch.no_grad()
def sinkhorn(
    scores: Tensor, epsilon: float, iterations: int, *, bound: float | None = None, overwrite: bool = False
) -> Tensor:
    """Assign the rows of all ranks to prototypes with equal total weight per prototype.

    The same as running it in one process on the rows of all ranks; equals the published exponential-domain formula to
    1e-6 wherever that one neither overflows nor divides by zero, and is finite for every finite input.

    Args:
        scores: float [N, K], similarities of this rank's images (queue rows included) to the prototypes; or [A, N, K],
            A problems of their own, such as the crops of the same images, whose sums travel together. Ranks hold equal
            numbers of rows or not; half-precision scores are computed in float32.
        epsilon: smoothness of the assignment; smaller is sharper.
        iterations: alternations of prototype and image normalisation (SwAV: 3); at least 1.
        bound: the caller's word that all |scores| <= bound (1 for cosines). Without it the range is looked up, which
            makes a GPU wait.
        overwrite: the memory of the scores may be taken for the result, which halves what is needed and touched.

    Returns:
        float32 (float64 for float64 scores), of the scores' shape; every row sums to 1.
    """
    if scores.dtype not in _SCALING_LIMIT:
        scores, overwrite = scores.float(), True
    scores_ANK = scores if scores.ndim == 3 else scores[None]
    with torch.autocast(scores.device.type, enabled=False):
        low, high = (-bound, bound) if bound is not None else _range(scores)
        if (high - low) / epsilon <= _SCALING_LIMIT[scores.dtype]:
            plan_ANK = scores_ANK if overwrite else torch.empty_like(scores_ANK)
            together = 1 if dist.size() == 1 and scores.device.type == "cpu" else len(scores_ANK)
            for given_ANK, part_ANK in zip(scores_ANK.split(together), plan_ANK.split(together), strict=True):
                _by_scaling(given_ANK, (low + high) / 2, epsilon, iterations, part_ANK)
            return plan_ANK.view_as(scores)
        plans = [_in_log_domain(scores_NK, epsilon, iterations) for scores_NK in scores_ANK]
        return torch.stack(plans).view_as(scores)


def _range(scores: Tensor) -> tuple[float, float]:
    ends = scores.new_full((2,), -torch.inf) if scores.numel() == 0 else torch.stack([-scores.amin(), scores.amax()])
    negative_low, high = dist.all_reduce_(ends, "max").tolist()
    return -negative_low, high


def _by_scaling(scores_ANK: Tensor, shift: float, epsilon: float, iterations: int, plan_ANK: Tensor) -> None:
    """Writes the plans to `plan_ANK`, which may be the scores themselves; a shift to their middle rounds least."""
    passes = _passes(scores_ANK, plan_ANK)
    u_AK = _inverse(_summed(passes.start(scores_ANK, shift, math.log2(math.e) / epsilon)))
    for number in range(1, iterations):
        if number % _ITERATIONS_IN_RANGE == 0:  # by a power of two, which rounds nothing
            u_AK = torch.ldexp(u_AK, -torch.frexp(u_AK.amax(1, keepdim=True)).exponent)
        u_AK = _inverse(_summed(passes.sweep(u_AK)))
    passes.finish(u_AK)


class Passes(Protocol):
    """Over the plans of several problems, in place."""

    def start(self, scores_ANK: Tensor, shift: float, scale: float) -> Tensor: ...
    def sweep(self, u_AK: Tensor) -> Tensor: ...
    def finish(self, u_AK: Tensor) -> None: ...


def _passes(scores_ANK: Tensor, plan_ANK: Tensor) -> Passes:
    if for_kernels(plan_ANK.device, plan_ANK.dtype) and scores_ANK.is_contiguous() and plan_ANK.is_contiguous():
        from clusterssl.cluster.sinkhorn_kernels import MOST_PROTOTYPES, ByKernels

        if plan_ANK.shape[2] <= MOST_PROTOTYPES:
            return ByKernels(plan_ANK)
    return ByOperations(plan_ANK)


class ByOperations:
    """The passes as PyTorch's operations, block of rows by block of rows."""

    def __init__(self, plan_ANK: Tensor) -> None:
        self.rows = _rows_at_a_time(plan_ANK[0])
        self.blocks = [(a, block_nK) for a, plan_NK in enumerate(plan_ANK) for block_nK in plan_NK.split(self.rows)]
        self.problems, self.prototypes = plan_ANK.shape[0], plan_ANK.shape[2]

    def start(self, scores_ANK: Tensor, shift: float, scale: float) -> Tensor:
        """plan = 2^((scores - shift) scale), and its sums over this rank's rows [A, K]."""
        given = [scores_nK for scores_NK in scores_ANK for scores_nK in scores_NK.split(self.rows)]
        column_AK = scores_ANK.new_zeros(self.problems, self.prototypes)
        for scores_nK, (a, block_nK) in zip(given, self.blocks, strict=True):
            if shift:
                scores_nK = torch.sub(scores_nK, shift, out=block_nK)
            torch.mul(scores_nK, scale, out=block_nK).exp2_()
            column_AK[a] += _times(block_nK.new_ones(len(block_nK)), block_nK)
        return column_AK

    def sweep(self, u_AK: Tensor) -> Tensor:
        """Sums [A, K] over rows of which each, times u, sums to 1."""
        column_AK = torch.zeros_like(u_AK)
        for a, block_nK in self.blocks:
            column_AK[a] += _times(_inverse(block_nK @ u_AK[a]), block_nK)
        return column_AK

    def finish(self, u_AK: Tensor) -> None:
        """The plan's columns times u, and its rows to the sum 1."""
        for a, block_nK in self.blocks:
            v_n = _inverse(block_nK @ u_AK[a])
            block_nK.mul_(u_AK[a]).mul_(v_n[:, None])


def _summed(column_AK: Tensor) -> Tensor:
    """Sums over all ranks, those of all problems in one message."""
    return dist.all_reduce_(column_AK.view(-1)).view_as(column_AK)


def _times(v_n: Tensor, block_nK: Tensor) -> Tensor:
    """v P; as a linear layer because torch's own vector times matrix is slower by a quarter on CPUs."""
    return F.linear(v_n[None], block_nK.T)[0]


def _inverse(x: Tensor) -> Tensor:
    return x.clamp_(min=torch.finfo(x.dtype).tiny).reciprocal_()


def _rows_at_a_time(x_NK: Tensor) -> int:
    """Rows of a block: what stays in a processor's cache; all of them on a GPU, where launches count."""
    return max(1, _CACHED_ELEMENTS // x_NK.shape[1] if x_NK.device.type == "cpu" else len(x_NK))


def _in_log_domain(scores_NK: Tensor, epsilon: float, iterations: int) -> Tensor:
    """The same with sums of exponentials that subtract a maximum first; for sharp epsilon or unbounded scores."""
    logits_NK = scores_NK / epsilon
    # A common shift of the columns changes nothing in the first row normalisation but keeps the first exp() in range.
    f_K = dist.all_reduce_(_column_maxima(logits_NK), "max").neg_()
    g_N = logits_NK.new_zeros(logits_NK.shape[0])
    for _ in range(iterations):
        # After the first pass the summands are entries of a plan of total mass K, so nothing overflows.
        column_K = dist.all_reduce_((logits_NK + f_K).add_(g_N[:, None]).exp_().sum(0))
        f_K = f_K - column_K.clamp_(min=torch.finfo(column_K.dtype).tiny).log_()
        g_N = -torch.logsumexp(logits_NK + f_K, dim=1)
    return (logits_NK + f_K).add_(g_N[:, None]).exp_()


def _column_maxima(logits_NK: Tensor) -> Tensor:
    if logits_NK.shape[0] == 0:
        return logits_NK.new_full((logits_NK.shape[1],), -torch.inf)
    return logits_NK.amax(0)
