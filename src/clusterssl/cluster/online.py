"""Assignments of one batch at a time: Sinkhorn over the batch of all ranks, joined by a queue of earlier batches.

Shape suffixes: A assigned crops, B images of a step and rank, N rows to assign, D feature dimension, K prototypes.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clusterssl import dist
from clusterssl.cluster.queue import FeatureQueue
from clusterssl.cluster.sinkhorn import sinkhorn
from clusterssl.errors import UserError

logger = logging.getLogger(__name__)


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

    def __init__(
        self,
        *,
        num_crops: int,
        step_images: int,
        epsilon: float,
        iterations: int,
        hard: bool = False,
        queue_length: int = 0,
        epoch_queue_starts: int = 0,
    ) -> None:
        """Set up without a queue; `begin_epoch` starts it.

        Args:
            num_crops: A.
            step_images: images of this rank in one optimiser step.
            epsilon: see `sinkhorn`.
            iterations: see `sinkhorn`.
            hard: round each assignment to its largest entry.
            queue_length: rows per crop over all ranks; lowered to a multiple of the images of a step.
            epoch_queue_starts: first epoch with a queue.

        Raises:
            UserError: `queue_length` is shorter than a step.
        """
        self.epsilon, self.iterations, self.hard = epsilon, iterations, hard
        self.queue: FeatureQueue | None = None
        self._num_crops, self._step_images, self._starts = num_crops, step_images, epoch_queue_starts
        self._length = usable_queue_length(queue_length, step_images * dist.size())
        if self._length != queue_length and dist.rank() == 0:
            logger.warning(
                "--queue_length %d is no multiple of the %d images of a step: using %d",
                queue_length, step_images * dist.size(), self._length,
            )  # fmt: skip

    def begin_epoch(self, epoch: int, prototypes_KD: Tensor) -> None:
        """Start the queue, empty, at the epoch the flags say; it is used once it is full."""
        if self.queue is None and self._length > 0 and epoch >= self._starts:
            self.queue = self._new_queue(prototypes_KD)

    @torch.no_grad()
    def assign(self, z_ABD: Tensor, prototypes_KD: Tensor) -> Tensor:
        """Assignments q [A, B, K] of unit embeddings, rows summing to 1; the batch then enters the queue.

        The current batch is never in the queue it is assigned with.
        """
        q_ABK = torch.stack([self._assign(slot, z_BD, prototypes_KD) for slot, z_BD in enumerate(z_ABD)])
        return F.one_hot(q_ABK.argmax(-1), q_ABK.shape[-1]).to(q_ABK.dtype) if self.hard else q_ABK

    def _assign(self, slot: int, z_BD: Tensor, prototypes_KD: Tensor) -> Tensor:
        rows_ND = z_BD
        if self.queue is not None:
            if self.queue.is_full(slot):
                rows_ND = torch.cat([self.queue.rows(slot).to(z_BD.dtype), z_BD])
            self.queue.push(slot, z_BD)
        with torch.autocast(z_BD.device.type, enabled=False):
            q_NK = sinkhorn(rows_ND @ prototypes_KD.T, self.epsilon, self.iterations, bound=1.0)
        return q_NK[-z_BD.shape[0] :]

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
