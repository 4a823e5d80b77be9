"""Assignments of one batch at a time: Sinkhorn over the batch of all ranks, joined by a queue of earlier batches.

Shape suffixes: A assigned crops, B images of a step and rank, N rows to assign, D feature dimension, K prototypes.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clusterssl import dist
from clusterssl.cluster.queue import FeatureQueue
from clusterssl.cluster.sinkhorn import sinkhorn
from clusterssl.config import require_numbers
from clusterssl.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AssignmentOptions:
    """Assignments."""

    epsilon: float = 0.05
    """smoothness of the assignments; 0.03 helps when the loss stays at ln K"""
    sinkhorn_iterations: int = 3
    """normalisations of the assignments"""
    hard_assignment: bool = False
    """round each assignment to its largest entry"""
    queue_length: int = 0
    """embeddings of earlier batches, over all ranks, that join the assignment; for small batches"""
    epoch_queue_starts: int = 15
    """first epoch with a queue"""

    def __post_init__(self) -> None:
        require_numbers(self, "epsilon", above=0)
        require_numbers(self, "sinkhorn_iterations", least=1)
        require_numbers(self, "queue_length", "epoch_queue_starts", least=0)


REMEDIES = (
    "Try a smaller --epsilon (0.03), a lower --base_lr or another --optimizer, longer --freeze_prototypes_niters, "
    "softer augmentation (--color_jitter), or a --queue_length when the batch is small"
)
"""against a collapse of online assignments"""


def usable_queue_length(asked: int, step_images: int) -> int:
    """The largest multiple of a step's images (over all ranks) that is no longer than `asked`.

    Raises:
        UserError: `asked` is not even one step long.
    """
    usable = asked - asked % step_images
    if asked > 0 and usable == 0:
        raise UserError(f"--queue_length {asked}: shorter than a step of {step_images} images; use 0 or at least that")
    return usable


class OnlineAssigner:
    """Turns embeddings into assignments; owns the queue."""

    def __init__(self, options: AssignmentOptions, num_crops: int, step_images: int) -> None:
        """Set up without a queue; `begin_epoch` starts it.

        Args:
            options: the flags; the queue's length is lowered to a multiple of the images of a step.
            num_crops: A.
            step_images: images of this rank in one optimiser step.

        Raises:
            UserError: the queue is shorter than a step.
        """
        self.options = options
        self.queue: FeatureQueue | None = None
        self._num_crops, self._step_images = num_crops, step_images
        self._length = usable_queue_length(options.queue_length, step_images * dist.size())
        if self._length != options.queue_length and dist.rank() == 0:
            logger.warning(
                "--queue_length %d is no multiple of the %d images of a step: using %d",
                options.queue_length, step_images * dist.size(), self._length,
            )  # fmt: skip

    def begin_epoch(self, epoch: int, prototypes_KD: Tensor) -> None:
        """Start the queue, empty, at the epoch the flags say; it is used once it is full."""
        if self.queue is None and self._length > 0 and epoch >= self.options.epoch_queue_starts:
            self.queue = self._new_queue(prototypes_KD)

    @torch.no_grad()
    def assign(self, z_ABD: Tensor, prototypes_KD: Tensor) -> Tensor:
        """Assignments q [A, B, K] of unit embeddings, rows summing to 1; the batch then enters the queue.

        The current batch is never in the queue it is assigned with.
        """
        rows_AND = torch.stack([self._with_queue(slot, z_BD) for slot, z_BD in enumerate(z_ABD)])
        with torch.autocast(z_ABD.device.type, enabled=False):
            scores_ANK = rows_AND @ prototypes_KD.T
            q_ANK = sinkhorn(
                scores_ANK, self.options.epsilon, self.options.sinkhorn_iterations, bound=1.0, overwrite=True
            )
        q_ABK = q_ANK[:, -z_ABD.shape[1] :].contiguous()
        return F.one_hot(q_ABK.argmax(-1), q_ABK.shape[-1]).to(q_ABK.dtype) if self.options.hard_assignment else q_ABK

    def _with_queue(self, slot: int, z_BD: Tensor) -> Tensor:
        """Rows to assign for one crop [N, D], the batch last; it then enters the queue."""
        rows_ND = z_BD
        if self.queue is not None:
            if self.queue.is_full(slot):
                rows_ND = torch.cat([self.queue.rows(slot).to(z_BD.dtype), z_BD])
            self.queue.push(slot, z_BD)
        return rows_ND

    def _new_queue(self, prototypes_KD: Tensor) -> FeatureQueue:
        length, dim = self._length // dist.size(), prototypes_KD.shape[1]
        return FeatureQueue(self._num_crops, length, self._step_images, dim, prototypes_KD.device)

    def state_dict(self) -> dict[str, Any]:
        """The queue's state; empty before it starts."""
        return {} if self.queue is None else self.queue.state_dict()

    def load_state_dict(self, state: dict[str, Any], prototypes_KD: Tensor) -> None:
        """Take back what `state_dict` gave."""
        if "filled" in state:
            self.queue = self._new_queue(prototypes_KD)
            self.queue.load_state_dict(state)
