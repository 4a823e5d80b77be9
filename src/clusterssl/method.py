"""What distinguishes one method from another, as the training loop sees it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clusterssl.monitor import Observation

Crops = list[Tensor]


class Method:
    """Base of all methods, called by `fit` in the order of this file; only `loss` must be written."""

    seen: Observation | None = None
    """of the last loss, for the monitor; with several heads, one of them"""
    remedies: str = ""
    """what to try when the run collapses, in words, with the method's flags"""

    optimizer: torch.optim.Optimizer
    """of the run, from the first `begin_epoch` on; for methods that begin a layer anew"""

    def begin_epoch(self, epoch: int) -> None:
        """Before the first step of an epoch: cluster the memory, solve the assignment, start a queue.

        Not called when a run resumes inside an epoch: what this computes belongs into `state_dict`.
        """

    def order(self, epoch: int) -> NDArray[np.int64] | None:
        """Dataset positions to visit in this epoch, int64; None: all, shuffled. A function of state, seed and epoch."""
        return None

    def due(self, step: int) -> bool:
        """Whether `refresh` must run before this step; the answer is a function of the state."""
        return False

    def refresh(self, step: int) -> None:
        """Something over all images between two steps, such as new labels; a checkpoint was written just before."""

    def begin_step(self, micro_batches: Iterator[tuple[Crops, Tensor]]) -> None:
        """With --accumulate above 1 only: look at the whole step, crops and index as `loss` gets them, before it."""

    def loss(self, crops: Crops, index: Tensor) -> Tensor:
        """Scalar loss of one (micro-)batch. crops: V tensors B x 3 x H x W; index: B dataset positions, int64."""
        raise NotImplementedError

    def before_step(self, step: int) -> None:
        """After backward, before the optimiser: for instance freeze prototypes."""

    def state_dict(self) -> dict[str, Any]:
        """Plain values and replicated tensors; what is split over ranks stands under the key "sharded".

        Rows (dimension 0) of sharded tensors, in rank order, are one global tensor, of which another number of ranks
        gets the shares of `dist.share`. Where rows run over the images of a step, no image moves to another step.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave, re-split for this number of ranks."""
