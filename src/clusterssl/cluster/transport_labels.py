"""Labels of several heads by optimal transport, hard ones or soft ones, and the loss over soft ones.

SwAV's authors found hard labels to work well over the whole dataset (Caron et al. 2020, arXiv 2006.09882, section 3.1)
and did not say which ones SeLa-v2 has; soft ones keep the largest entries of an image's row of the plan.

Shape suffixes: M slots of this rank, B images, V crops, R = V * B rows, D dimension, K clusters, H heads, J entries
kept of a row, N images of the dataset.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clusterssl import dist
from clusterssl.cluster.transport import TransportOptions, transport


class TransportLabels:
    """Solves the transport of each head, beginning where its last one ended; holds the soft labels of all images."""

    def __init__(
        self,
        clusters: Sequence[int],
        images: int,
        *,
        sharpness: float,
        options: TransportOptions,
        kept: int = 1,
        device: torch.device | None = None,
    ) -> None:
        """Start without labels.

        Args:
            clusters: K of each head.
            images: N.
            sharpness: of the kernel, 1 / epsilon.
            options: the flags.
            kept: J; 1: hard labels, for which nothing is held here.
            device: of the soft labels.
        """
        self.sharpness, self.options, self.kept = sharpness, options, kept
        self.potentials = [torch.zeros(k, dtype=torch.float64) for k in clusters]
        shape = (len(clusters), images if kept > 1 else 0, kept)
        self.clusters_HNJ = torch.zeros(shape, dtype=torch.int32, device=device)
        self.weights_HNJ = torch.zeros(shape, device=device)

    def assign(self, head: int, z_MD: Tensor, weight_KD: Tensor, index_M: Tensor, name: str) -> Tensor:
        """Labels of the slots for one head, int64 [M], and its soft ones into the table; a collective call.

        Args:
            head: which one.
            z_MD: embeddings.
            weight_KD: its prototypes.
            index_M: dataset positions of the slots, each in one slot only.
            name: for the log.
        """
        plan = transport(
            z_MD, weight_KD, sharpness=self.sharpness, options=self.options, start_K=self.potentials[head],
            kept=self.kept, name=name,
        )  # fmt: skip
        self.potentials[head] = plan.potentials_K
        if self.kept > 1:
            where = dist.all_gather_cat(index_M)
            self.weights_HNJ[head] = 0
            self.weights_HNJ[head, where] = dist.all_gather_cat(plan.weights_NJ.to(self.weights_HNJ.dtype))
            self.clusters_HNJ[head, where] = dist.all_gather_cat(plan.clusters_NJ.int())
        return plan.labels_N

    def cross_entropy(self, scores_HRK: Sequence[Tensor], index_B: Tensor, temperature: float) -> Tensor:
        """Mean over heads of the cross-entropy of all crops with their image's soft label.

        The mean runs over the labelled rows of all ranks, times the number of ranks, as in `multi_head_cross_entropy`.

        Args:
            scores_HRK: one [R, K_h] per head, row v * B + b for crop v of image b.
            index_B: dataset positions of the images.
            temperature: of the softmax.
        """
        weights_HBJ, clusters_HBJ = self.weights_HNJ[:, index_B], self.clusters_HNJ[:, index_B].long()
        counted_H = dist.all_reduce_((weights_HBJ.sum(2) > 0).sum(1)).clamp(min=1)
        losses = []
        for scores_RK, weights_BJ, clusters_BJ, counted in zip(
            scores_HRK, weights_HBJ, clusters_HBJ, counted_H, strict=True
        ):
            log_p_VBK = (scores_RK / temperature).log_softmax(1).unflatten(0, (-1, len(index_B)))
            views = len(log_p_VBK)
            total = (weights_BJ * log_p_VBK.gather(2, clusters_BJ.expand(views, -1, -1))).sum()
            losses.append(-total * (dist.size() / (views * counted)))
        return torch.stack(losses).mean()

    def state_dict(self) -> dict[str, Any]:
        """Potentials and soft labels, replicated values."""
        soft = {"soft_clusters": self.clusters_HNJ, "soft_weights": self.weights_HNJ} if self.kept > 1 else {}
        return {"potentials": self.potentials, **soft}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.potentials = [potentials_K.to("cpu", torch.float64) for potentials_K in state["potentials"]]
        if self.kept > 1:
            self.clusters_HNJ = state["soft_clusters"].to(self.clusters_HNJ)
            self.weights_HNJ = state["soft_weights"].to(self.weights_HNJ)
