"""Weighted k-nearest-neighbour classification of frozen features.

Legend of suffixes: N training images, Q query images, F features, C classes, k neighbours.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from clusterssl import dist
from clusterssl.evals.search import BANK_CHUNK, CHUNK, nearest

logger = logging.getLogger(__name__)


def knn_accuracy(
    train_NF: Tensor,
    train_labels_N: Tensor,
    test_QF: Tensor,
    test_labels_Q: Tensor,
    *,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.1,
    chunk: int = CHUNK,
    bank_chunk: int = BANK_CHUNK,
    device: torch.device | str | None = None,
) -> dict[int, tuple[float, float]]:
    """Top-1 and top-5 accuracy of weighted nearest neighbours (Wu et al. 2018, section 3.4).

    Each of the k most similar training images (cosine) votes for its class with weight exp(similarity / temperature).
    Classes without a vote follow in the order of their numbers, as in the published evaluations, so that top-5 with
    fewer than five voted classes is flattered. Similarities are computed in the features' own precision, votes are
    summed in float64. The training features may be memory-mapped: they are read block by block, once, and never more
    than chunk x bank_chunk similarities exist at a time; see `memory_mib`.

    A collective: every rank passes the same tensors; chunks of queries are shared out, and since the chunks do not
    depend on the number of ranks, neither does the result.

    Args:
        train_NF: training features, any scale (rows are normalised), float32 or float64.
        train_labels_N: classes 0 .. C - 1, int64.
        test_QF: query features.
        test_labels_Q: their classes.
        ks: numbers of neighbours; those above N are lowered to N.
        temperature: tau of the weights.
        chunk: queries at a time.
        bank_chunk: training images at a time.
        device: where to compute; that of `train_NF` when None.

    Returns:
        {k: (top-1, top-5)} in percent, k ascending.
    """
    sizes = _fitting(ks, len(train_NF))
    device = train_NF.device if device is None else torch.device(device)
    num_classes = int(max(train_labels_N.max(), test_labels_Q.max())) + 1
    starts = range(0, len(test_QF), chunk)
    first, last = dist.share(len(starts))
    mine = [slice(start, start + chunk) for start in starts[first:last]]
    found = nearest(train_NF, [test_QF[part] for part in mine], sizes[-1], bank_chunk=bank_chunk, device=device)
    train_labels_N = train_labels_N.to(device)
    correct = torch.zeros(len(sizes), 2, dtype=torch.int64)
    for part, (similarity_Qk, row_Qk) in zip(mine, found, strict=True):
        targets_Q, label_Qk = test_labels_Q[part].to(device), train_labels_N[row_Qk]
        for i, k in enumerate(sizes):
            scores_QC = _votes(similarity_Qk[:, :k], label_Qk[:, :k], num_classes, temperature)
            correct[i] += _hits(scores_QC, targets_Q)
    percent = 100.0 * dist.all_reduce_(correct).double() / len(test_QF)
    return {k: (float(top1), float(top5)) for k, (top1, top5) in zip(sizes, percent.tolist(), strict=True)}


def _fitting(ks: Sequence[int], size: int) -> list[int]:
    lowered = [k for k in ks if k > size]
    if lowered and dist.rank() == 0:
        logger.warning("k-NN: k = %s lowered to %d, the number of training images", lowered, size)
    return sorted({min(k, size) for k in ks})


def _votes(similarity_Qk: Tensor, label_Qk: Tensor, num_classes: int, temperature: float) -> Tensor:
    """Sum of weights per class, Q x C float64; weights are relative to the nearest neighbour's and cannot overflow."""
    similarity_Qk = similarity_Qk.double()
    weight_Qk = ((similarity_Qk - similarity_Qk[:, :1]) / temperature).exp()
    scores_QC = weight_Qk.new_zeros(len(weight_Qk), num_classes)
    return scores_QC.scatter_add_(1, label_Qk, weight_Qk)


def _hits(scores_QC: Tensor, targets_Q: Tensor) -> Tensor:
    """Numbers of queries whose class is first, and among the first five, int64 [2] on the CPU."""
    ranked = scores_QC.argsort(dim=1, descending=True, stable=True)[:, :5] == targets_Q[:, None]
    return torch.stack([ranked[:, 0].sum(), ranked.sum()]).cpu()


def check_flags(ks: Sequence[int], temperature: float) -> str:
    """What is wrong with the flags of the evaluation, or ""."""
    if not ks or min(ks) < 1:
        return f"--nb_knn {' '.join(map(str, ks))}: numbers of neighbours start at 1"
    if not (temperature > 0 and math.isfinite(temperature)):
        return f"--temperature {temperature}: must be above 0"
    return ""
