"""Sinkhorn-Knopp: soft assignments of images to prototypes under the constraint that all prototypes are used equally.

SwAV (Caron et al. 2020, arXiv 2006.09882), equations 3 to 5, after Cuturi 2013. The plan is kept as diag(v) P diag(u)
with P = exp((scores - shift) / epsilon) computed once, so that an iteration is two matrix-vector products and one
all-reduce of a K-vector, and no N x K matrix is rewritten.

Shape suffixes: N images of this rank, K prototypes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clusterssl import dist

# Largest (max - min score) / epsilon for which exp() in float32 keeps every entry of P a normal number, with room for
# the products with u and v; beyond it the log domain is used.
_SCALING_LIMIT = {torch.float32: 70.0, torch.float64: 600.0}


@torch.no_grad()
def sinkhorn(scores_NK: Tensor, epsilon: float, iterations: int, *, bound: float | None = None) -> Tensor:
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

    Returns:
        float32 (float64 for float64 scores) [N, K]; every row sums to 1.
    """
    scores_NK = scores_NK if scores_NK.dtype == torch.float64 else scores_NK.float()
    with torch.autocast(scores_NK.device.type, enabled=False):
        low, high = (-bound, bound) if bound is not None else _range(scores_NK)
        if (high - low) / epsilon <= _SCALING_LIMIT[scores_NK.dtype]:
            return _by_scaling(scores_NK, high, epsilon, iterations)
        return _in_log_domain(scores_NK, epsilon, iterations)


def _range(scores_NK: Tensor) -> tuple[float, float]:
    if scores_NK.numel() == 0:
        ends = scores_NK.new_full((2,), -torch.inf)
    else:
        ends = torch.stack([-scores_NK.amin(), scores_NK.amax()])
    negative_low, high = dist.all_reduce_(ends, "max").tolist()
    return -negative_low, high


def _by_scaling(scores_NK: Tensor, shift: float, epsilon: float, iterations: int) -> Tensor:
    plan_NK = torch.sub(scores_NK, shift).div_(epsilon).exp_()
    tiny = torch.finfo(plan_NK.dtype).tiny
    v_N = plan_NK.new_ones(plan_NK.shape[0])
    for _ in range(iterations):
        u_K = dist.all_reduce_(v_N @ plan_NK).clamp_(min=tiny).reciprocal_()
        v_N = (plan_NK @ u_K).clamp_(min=tiny).reciprocal_()
    return plan_NK.mul_(u_K).mul_(v_N[:, None])


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
