"""Labels that are computed once an epoch and learned in between: what DeepCluster-v2 and SeLa-v2 share.

Shape suffixes: A assigned crops, B images, V crops, R = V * B rows, M slots of this rank, D dimension, H heads,
K clusters, N images of the dataset.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clusterssl import dist
from clusterssl.cluster.memory import IGNORED, MemoryBank, label_table
from clusterssl.errors import UserError


class OfflineLabels:
    """The labels of all images for every head, renewed from a memory of embeddings."""

    def __init__(self, num_heads: int, num_images: int, memory: MemoryBank) -> None:
        """Start without labels; until `renew`, all images are ignored."""
        self.memory = memory
        self.table_HN = torch.full(
            (num_heads, num_images), IGNORED, dtype=torch.int32, device=memory.embeddings_AMD.device
        )

    @torch.no_grad()
    def renew(self, assign: Callable[[int, Tensor], Tensor]) -> None:
        """Compute all labels anew; a collective call.

        Args:
            assign: from the number of a head and the embeddings [M, D] of this rank to their labels, int64 [M]. Head h
                gets the embeddings of assigned crop h mod A.
        """
        memory_AMD = self.memory.embeddings_AMD
        labels_HM = torch.stack([assign(h, memory_AMD[h % len(memory_AMD)]) for h in range(len(self.table_HN))])
        self.table_HN = label_table(labels_HM, self.memory.index_M, self.memory.slots(), self.table_HN.shape[1])

    def of(self, index_B: Tensor) -> Tensor:
        """Labels of the images at these dataset positions, int64 [H, B]."""
        return self.table_HN[:, index_B].long()

    def state_dict(self) -> dict[str, Any]:
        """The memory's state and the table."""
        return {**self.memory.state_dict(), "labels": self.table_HN}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave.

        Raises:
            UserError: labels or memory are of another dataset or number of heads.
        """
        if state["labels"].shape != self.table_HN.shape:
            raise UserError(
                f"the checkpoint holds labels of {tuple(state['labels'].shape)} heads and images, these flags make "
                f"{tuple(self.table_HN.shape)}; start in another --dump_path"
            )
        self.memory.load_state_dict(state)
        self.table_HN = state["labels"].to(self.table_HN)


def multi_head_cross_entropy(scores_HRK: Sequence[Tensor], labels_HB: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean over heads of the cross-entropy of all crops with their image's label (Caron et al. 2020, appendix D).

    The mean runs over the labelled rows of all ranks, times the number of ranks: averaged over ranks, as gradients are,
    it is the mean over all labelled rows. Without any labelled row it is zero.

    Args:
        scores_HRK: one [R, K_h] per head, row v * B + b for crop v of image b.
        labels_HB: int64 [H, B]; `IGNORED` is left out.
        temperature: of the softmax.
    """
    counted_H = dist.all_reduce_((labels_HB != IGNORED).sum(1)).clamp(min=1)
    losses = []
    for scores_RK, labels_B, counted in zip(scores_HRK, labels_HB, counted_H, strict=True):
        views = scores_RK.shape[0] // labels_B.shape[0]
        total = F.cross_entropy(scores_RK / temperature, labels_B.repeat(views), ignore_index=IGNORED, reduction="sum")
        losses.append(total * (dist.size() / (views * counted)))
    return torch.stack(losses).mean()
