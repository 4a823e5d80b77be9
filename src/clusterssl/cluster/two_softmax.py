"""Targets and predictions of Self-Classifier: softmax over the batch and softmax over the classes, uniform prior.

Amrani, Karlinsky, Bronstein 2022, https://arxiv.org/abs/2103.10994, section 3.

The softmax over the batch runs over the images of all ranks. Of each class it needs the largest logit and a sum over
the batch, so ranks exchange vectors over the classes (one maximum and one differentiable sum for all views and
classifiers together) and never the logits.

Shape suffixes: V views, B images of this rank, K classes, N = images of all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from clusterssl import dist


class Posterior(NamedTuple):
    """What one classifier says of the images of this rank, per view."""

    target_VBK: Tensor
    """p(class | image) from p(image | class) and a uniform prior of classes; rows sum to 1"""
    log_prediction_VBK: Tensor
    """log(N / K * p(class | image) / sum of p(class | image) over the batch), to be compared with the target"""


def two_softmax(
    logits: Sequence[Tensor], row_tau: float = 0.1, col_tau: float = 0.05, eps: float = 1e-12
) -> list[Posterior]:
    """Targets and predictions of several classifiers; float32 or better, also inside autocast.

    Gradients flow through both. Those with respect to the logits belong to the sum of the ranks' losses, so they are
    the ranks' number times those of the mean: right where parameter gradients are averaged over ranks afterwards.

    Args:
        logits: [V, B, K] of each classifier; B is the same on all ranks.
        row_tau: temperature of the softmax over classes.
        col_tau: temperature of the softmax over the batch.
        eps: smallest normaliser, and added inside the logarithm.
    """
    with torch.autocast(logits[0].device.type, enabled=False):
        scores = [x_VBK.to(torch.promote_types(x_VBK.dtype, torch.float32)) for x_VBK in logits]
        sizes = [x_VBK.shape[-1] for x_VBK in scores]
        largest = dist.all_reduce_(torch.cat([x_VBK.detach().amax(1) for x_VBK in scores], dim=1), "max")
        columns = [
            ((x_VBK - max_VK[:, None]) / col_tau).exp()
            for x_VBK, max_VK in zip(scores, largest.split(sizes, dim=1), strict=True)
        ]
        rows = [(x_VBK / row_tau).softmax(-1) for x_VBK in scores]
        mine = torch.stack([torch.cat([part.sum(1) for part in parts], dim=1) for parts in (columns, rows)])
        sums = dist.all_reduce_sum(mine).split(sizes, dim=2)
        return [_posterior(*parts, eps) for parts in zip(columns, rows, sums, strict=True)]


def _posterior(column_VBK: Tensor, row_VBK: Tensor, sums_2VK: Tensor, eps: float) -> Posterior:
    """From exponentials over the batch, softmax over classes, and the sums of both over the batch of all ranks."""
    column_VK, row_VK = sums_2VK
    batch_VBK = column_VBK / column_VK[:, None]  # at least 1: the largest exponential is exp(0)
    target_VBK = batch_VBK / batch_VBK.sum(-1, keepdim=True).clamp_min(eps)
    images, classes = dist.size() * row_VBK.shape[1], row_VBK.shape[2]
    balanced_VBK = row_VBK / row_VK[:, None].clamp_min(eps)
    return Posterior(target_VBK, (images / classes * balanced_VBK + eps).log())


def cross_prediction(posteriors: Sequence[Posterior], global_views: int = 2) -> Tensor:
    """Mean cross-entropy between the target of one view and the prediction from another.

    Over all ordered pairs of views except pairs of two local ones, over all classifiers, and over the images of this
    rank.

    Args:
        posteriors: of each classifier.
        global_views: the first views, which see most of the image.
    """
    total, pairs = posteriors[0].target_VBK.new_zeros(()), 0
    for target_VBK, log_p_VBK in posteriors:
        views, images, _ = target_VBK.shape
        shared = min(global_views, views)
        of_all_BK, of_global_BK = log_p_VBK.sum(0), log_p_VBK[:shared].sum(0)
        for view in range(shared):
            total = total - (target_VBK[view] * (of_all_BK - log_p_VBK[view])).sum() / images
        total = total - (target_VBK[shared:].sum(0) * of_global_BK).sum() / images
        pairs += shared * (shared - 1) + 2 * shared * (views - shared)
    return total / pairs
