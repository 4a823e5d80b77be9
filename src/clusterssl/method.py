"""What distinguishes one method from another, as the training loop sees it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor

from clusterssl.monitor import Observation

Crops = list[Tensor]


class Method(Protocol):
    """What distinguishes one method from another, called by `fit` in this order."""

    seen: Observation | None
    """of the last loss, for the monitor; with several heads, one of them"""
    remedies: str
    """what to try when the run collapses, in words, with the method's flags"""

    def begin_epoch(self, epoch: int) -> None:
        """Before the first step of an epoch: cluster the memory, solve the assignment, start a queue.

        Not called when a run resumes inside an epoch: what this computes belongs into `state_dict`.
        """

    def begin_step(self, micro_batches: Iterator[Crops]) -> None:
        """With --accumulate above 1 only: look at the crops of the whole step before its losses are computed."""

    def loss(self, crops: Crops, index: Tensor) -> Tensor:
        """Scalar loss of one (micro-)batch. crops: V tensors B x 3 x H x W; index: B dataset positions, int64."""

    def before_step(self, step: int) -> None:
        """After backward, before the optimiser: for instance freeze prototypes."""

    def state_dict(self) -> dict[str, Any]:
        """Plain values and replicated tensors; what is split over ranks stands under the key "sharded".

        Those are tensors whose dimension 0 runs over the images of a step, so that the ranks' tensors in rank order are
        the global batch: another number of ranks then re-splits them without moving an image to another step.
        """

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave, re-split for this number of ranks."""
