"""Sinkhorn-Knopp: soft assignments of images to prototypes under the constraint that all prototypes are used equally.

SwAV (Caron et al. 2020, arXiv 2006.09882), equations 3 to 5, after Cuturi 2013. The plan is kept as diag(v) P diag(u)
with P = exp((scores - shift) / epsilon) computed once, so that an iteration is two matrix-vector products and one
all-reduce of a K-vector, and no N x K matrix is rewritten. On a CPU both products are taken block of rows by block of
rows, while the block is in the cache; exponentials are powers of two, which cost a third of those of e there.

Shape suffixes: N images of this rank, n images of a block, K prototypes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clusterssl import dist

# Largest (max - min score) / epsilon for which exp() in float32 keeps every entry of P a normal number, with room for
# the products with u and v; beyond it the log domain is used.
_SCALING_LIMIT = {torch.float32: 70.0, torch.float64: 600.0}
_CACHED_ELEMENTS = 2**19


@torch.no_grad()
def sinkhorn(
    scores_NK: Tensor, epsilon: float, iterations: int, *, bound: float | None = None, overwrite: bool = False
) -> Tensor:
    """Assign the rows of all ranks to prototypes with equal total weight per prototype.

    The same as running it in one process on the rows of all ranks; equals the published exponential-domain formula to
    1e-6 wherever that one neither overflows nor divides by zero, and is finite for every finite input.

    Args:
        scores_NK: float [N, K], similarities of this rank's images (queue rows included) to the prototypes. Ranks hold
            equal numbers of rows or not; half-precision scores are computed in float32.
        epsilon: smoothness of the assignment; smaller is sharper.
        iterations: alternations of prototype and image normalisation (SwAV: 3); at least 1.
        bound: the caller's word that all |scores| <= bound (1 for cosines). Without it the range is looked up, which
            makes a GPU wait.
        overwrite: the memory of the scores may be taken for the result, which halves what is needed and touched.

    Returns:
        float32 (float64 for float64 scores) [N, K]; every row sums to 1.
    """
    if scores_NK.dtype not in _SCALING_LIMIT:
        scores_NK, overwrite = scores_NK.float(), True
    with torch.autocast(scores_NK.device.type, enabled=False):
        low, high = (-bound, bound) if bound is not None else _range(scores_NK)
        if (high - low) / epsilon <= _SCALING_LIMIT[scores_NK.dtype]:
            plan_NK = scores_NK if overwrite else torch.empty_like(scores_NK)
            return _by_scaling(scores_NK, (low + high) / 2, epsilon, iterations, plan_NK)
        return _in_log_domain(scores_NK, epsilon, iterations)


def _range(scores_NK: Tensor) -> tuple[float, float]:
    if scores_NK.numel() == 0:
        ends = scores_NK.new_full((2,), -torch.inf)
    else:
        ends = torch.stack([-scores_NK.amin(), scores_NK.amax()])
    negative_low, high = dist.all_reduce_(ends, "max").tolist()
    return -negative_low, high


def _by_scaling(scores_NK: Tensor, shift: float, epsilon: float, iterations: int, plan_NK: Tensor) -> Tensor:
    """Writes the plan to `plan_NK`, which may be the scores themselves; a shift in the middle of them rounds least."""
    tiny = torch.finfo(plan_NK.dtype).tiny
    scale = math.log2(math.e) / epsilon
    rows = _rows_at_a_time(plan_NK)
    blocks_nK = plan_NK.split(rows)
    column_K = plan_NK.new_zeros(plan_NK.shape[1])
    for scores_nK, block_nK in zip(scores_NK.split(rows), blocks_nK, strict=True):
        if shift:
            scores_nK = torch.sub(scores_nK, shift, out=block_nK)
        torch.mul(scores_nK, scale, out=block_nK).exp2_()
        column_K += block_nK.new_ones(len(block_nK)) @ block_nK
    u_K = dist.all_reduce_(column_K).clamp_(min=tiny).reciprocal_()
    for _ in range(iterations - 1):
        column_K = torch.zeros_like(column_K)
        for block_nK in blocks_nK:
            v_n = (block_nK @ u_K).clamp_(min=tiny).reciprocal_()
            column_K += v_n @ block_nK
        u_K = dist.all_reduce_(column_K).clamp_(min=tiny).reciprocal_()
    for block_nK in blocks_nK:
        v_n = (block_nK @ u_K).clamp_(min=tiny).reciprocal_()
        block_nK.mul_(u_K).mul_(v_n[:, None])
    return plan_NK


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
