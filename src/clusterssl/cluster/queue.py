"""A queue of past embeddings that lets Sinkhorn see more images than one batch holds (SwAV, section 4.1).

Shape suffixes: A crops that are assigned, T batches in the queue, B images per batch and rank, D feature dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor


class FeatureQueue:
    """The embeddings of the last T batches of this rank, newest first, one queue per assigned crop.

    Whether it is full is counted, not read off its numbers.
    """

    def __init__(self, num_crops: int, length: int, batch: int, dim: int, device: torch.device) -> None:
        """Make an empty queue.

        Args:
            num_crops: A, assigned crops.
            length: rows of this rank and crop, a multiple of `batch`.
            batch: rows that arrive at once.
            dim: D.
            device: where it lives; rows are float32.
        """
        self._rows_ATBD = torch.zeros(num_crops, length // batch, batch, dim, device=device)
        self._filled = [0] * num_crops

    def is_full(self, slot: int) -> bool:
        """Whether T batches have arrived for the crop at position `slot` of the assigned crops."""
        return self._filled[slot] >= self._rows_ATBD.shape[1]

    def rows(self, slot: int) -> Tensor:
        """Embeddings [T * B, D] of one crop, newest batch first."""
        return self._rows_ATBD[slot].flatten(0, 1)

    @torch.no_grad()
    def push(self, slot: int, z_BD: Tensor) -> None:
        """Put one batch [B, D] in front; the oldest batch leaves."""
        rows_TBD = self._rows_ATBD[slot]
        rows_TBD[1:] = rows_TBD[:-1].clone()
        rows_TBD[0] = z_BD.detach()
        self._filled[slot] += 1

    def state_dict(self) -> dict[str, object]:
        """Rows with the batch axis first, so that ranks concatenate and re-split them along it, and the counts."""
        return {"sharded": {"queue": self._rows_ATBD.permute(2, 0, 1, 3).contiguous()}, "filled": list(self._filled)}

    def load_state_dict(self, state: dict) -> None:
        """Take back what `state_dict` gave, already re-split for this rank.

        Raises:
            ValueError: another shape than this queue's.
        """
        rows_ATBD = state["sharded"]["queue"].permute(1, 2, 0, 3)
        if rows_ATBD.shape != self._rows_ATBD.shape:
            raise ValueError(f"queue of shape {tuple(rows_ATBD.shape)}, expected {tuple(self._rows_ATBD.shape)}")
        self._rows_ATBD.copy_(rows_ATBD)
        self._filled = list(state["filled"])
