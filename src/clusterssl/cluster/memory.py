"""Embeddings of all images as training saw them last, and a table of the labels that come of them.

DeepCluster-v2 and SeLa-v2 (Caron et al. 2020, arXiv 2006.09882, section 5.1 and appendix D): the assignments of an
epoch are computed from the embeddings of the epoch before, without another pass over the images.

Shape suffixes: A assigned crops, T steps of an epoch, S images of a step and rank, M = T * S slots, D dimension,
B images of a (micro-)batch, H heads, N images of the dataset.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from clusterssl import dist
from clusterssl.errors import UserError

IGNORED = -100
"""label of an image that is in no slot; the cross-entropy leaves it out"""


class MemoryBank:
    """One slot per image that this rank sees in an epoch, filled and overwritten in the order of the steps.

    Slot t * S + s belongs to image s of this rank's share of step t. Ranks hold equal numbers of slots.
    """

    def __init__(self, num_crops: int, steps: int, step_images: int, dim: int, device: torch.device) -> None:
        """Make an empty bank.

        Args:
            num_crops: A.
            steps: T, steps of an epoch.
            step_images: S, images of this rank in one step.
            dim: D.
            device: where it lives; embeddings are float32.
        """
        self.steps, self.step_images = steps, step_images
        self.embeddings_AMD = torch.zeros(num_crops, steps * step_images, dim, device=device)
        self.index_M = torch.full((steps * step_images,), -1, dtype=torch.int64, device=device)
        self.filled = False
        self._next = 0

    def slots(self) -> Tensor:
        """Numbers of this rank's slots among those of all ranks, int64 [M] on the CPU.

        The slot that an image has among all does not depend on the number of ranks.
        """
        step_T = torch.arange(self.steps)[:, None] * self.step_images * dist.size()
        return (step_T + dist.rank() * self.step_images + torch.arange(self.step_images)).flatten()

    @torch.no_grad()
    def write(self, z_ABD: Tensor, index_B: Tensor) -> None:
        """Put the next B images of the epoch into their slots; after the last slot comes the first.

        Args:
            z_ABD: embeddings of the assigned crops.
            index_B: dataset positions, int64.
        """
        slots = slice(self._next, self._next + len(index_B))
        self.embeddings_AMD[:, slots] = z_ABD.detach().to(self.embeddings_AMD.dtype)
        self.index_M[slots] = index_B
        self._next = slots.stop % len(self.index_M)

    @torch.no_grad()
    def fill(self, embed: Callable[[list[Tensor]], Tensor], batches: Iterable[tuple[list[Tensor], Tensor]]) -> None:
        """Fill all slots in one pass.

        Args:
            embed: from the crops of a batch to the embeddings [A, B, D] of the assigned ones.
            batches: crops and dataset positions [B] of all batches of an epoch, in order (`Feed.augmented`).
        """
        self._next = 0
        for crops, index_B in batches:
            self.write(embed(crops), index_B)
        self.filled = True

    def state_dict(self) -> dict[str, Any]:
        """State between two steps; the axis of a step's images comes first, which ranks concatenate and re-split."""
        rows_ATSD = self.embeddings_AMD.unflatten(1, (self.steps, self.step_images))
        sharded = {
            "memory": rows_ATSD.permute(2, 1, 0, 3).contiguous(),
            "memory_index": self.index_M.view(self.steps, self.step_images).T.contiguous(),
        }
        return {"sharded": sharded, "memory_step": self._next // self.step_images, "memory_filled": self.filled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave, already re-split for this rank.

        Raises:
            UserError: the bank is of another dataset, batch or embedding size.
        """
        rows_ATSD = state["sharded"]["memory"].permute(2, 1, 0, 3)
        expected = self.embeddings_AMD.unflatten(1, (self.steps, self.step_images)).shape
        if rows_ATSD.shape != expected:
            raise UserError(
                f"the checkpoint's memory bank has {tuple(rows_ATSD.shape)} crops, steps, images and dimensions, "
                f"these flags make {tuple(expected)}; start in another --dump_path"
            )
        self.embeddings_AMD.copy_(rows_ATSD.flatten(1, 2))
        self.index_M.copy_(state["sharded"]["memory_index"].T.flatten())
        self.filled = state["memory_filled"]
        self._next = state["memory_step"] * self.step_images


@torch.no_grad()
def label_table(labels_HM: Tensor, index_M: Tensor, slots_M: Tensor, num_images: int) -> Tensor:
    """Labels of all images, from those of this rank's slots; a collective call.

    Args:
        labels_HM: int64 [H, M], at least 0.
        index_M: dataset positions of the slots.
        slots_M: numbers of the slots over all ranks; an image in two slots keeps the label of the later one.
        num_images: N.

    Returns:
        int32 [H, N], the same on every rank; `IGNORED` for images in no slot.
    """
    heads, device = labels_HM.shape[0], labels_HM.device
    base = int(dist.all_reduce_(labels_HM.max(), "max")) + 1
    # Slot and label in one number: its maximum is the label of the latest slot, within and over ranks.
    written_HM = slots_M.to(device) * base + labels_HM
    table_HN = torch.full((heads, num_images), -1, dtype=torch.int64, device=device)
    table_HN.scatter_reduce_(1, index_M.expand(heads, -1), written_HM, "amax")
    dist.all_reduce_(table_HN, "max")
    return torch.where(table_HN < 0, IGNORED, table_HN % base).int()
