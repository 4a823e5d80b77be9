"""A queue of past embeddings in which an image finds its nearest neighbour among other images.

NNCLR (Dwibedi et al. 2021, arXiv 2104.14548) and Self-Classifier (Amrani et al. 2022, arXiv 2103.10994) replace a view
by its neighbour. Every rank holds the same queue, because all ranks put in the embeddings of all; a checkpoint holds
each row once, in the shard of one rank.

Shape suffixes: L places in the queue, B images of this rank, D feature dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clusterssl import dist
from clusterssl.errors import UserError

_EMPTY = -1
_PRODUCTS = 2**25  # similarities held at a time: 128 MiB


class NeighbourQueue:
    """The last L embeddings of all ranks with the dataset positions of their images, a ring."""

    def __init__(self, length: int, dim: int, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        """Make an empty queue of `length` rows of `dim` numbers on every rank."""
        self.rows_LD = torch.zeros(length, dim, device=device, dtype=dtype)
        self.index_L = torch.full((length,), _EMPTY, device=device, dtype=torch.int64)
        self.pushed = 0
        self._waiting: list[tuple[Tensor, Tensor]] = []

    @property
    def full(self) -> bool:
        """Whether every place has been filled at least once."""
        return self.pushed >= len(self.rows_LD)

    @torch.no_grad()
    def push(self, z_BD: Tensor, index_B: Tensor, *, more: bool = False) -> None:
        """Put in the embeddings of all ranks, in rank order, which is their order in the global batch.

        Args:
            z_BD: embeddings of this rank, as many as on the others.
            index_B: dataset positions of their images, int64.
            more: further micro-batches of this step follow; all of them enter with the last.
        """
        self._waiting.append((z_BD.detach().to(self.rows_LD.dtype), index_B))
        if more:
            return
        parts = zip(*self._waiting, strict=True)
        z_ND, index_N = (dist.all_gather_cat(torch.cat(part), equal=True) for part in parts)
        self._waiting = []
        length, count = len(self.rows_LD), len(index_N)
        kept = min(length, count)
        places = (self.pushed + count - kept + torch.arange(kept, device=self.index_L.device)) % length
        self.rows_LD[places] = z_ND[count - kept :]
        self.index_L[places] = index_N[count - kept :]
        self.pushed += count

    @torch.no_grad()
    def nearest(self, z_BD: Tensor, index_B: Tensor) -> Tensor:
        """The most similar row (by dot product) of another image for each image, [B, D] in the type of `z_BD`.

        All rows with the image's own dataset position are passed over, however many there are: a queue longer than the
        dataset holds an image more than once. A queue of nothing else gives the image's own row.

        Args:
            z_BD: embeddings.
            index_B: dataset positions of their images, int64.
        """
        best: list[Tensor] = []
        at_once = max(1, _PRODUCTS // len(self.rows_LD))
        with torch.autocast(z_BD.device.type, enabled=False):
            for z_CD, index_C in zip(z_BD.split(at_once), index_B.split(at_once), strict=True):
                similarity_CL = z_CD.to(self.rows_LD.dtype) @ self.rows_LD.T
                similarity_CL.masked_fill_(index_C[:, None] == self.index_L, -torch.inf)
                best.append(similarity_CL.argmax(1))
        return self.rows_LD[torch.cat(best)].to(z_BD.dtype)

    def state_dict(self) -> dict[str, Any]:
        """This rank's share of the rows, in the order of their places, and how many were put in so far."""
        start, stop = dist.share(len(self.rows_LD))
        mine = {"rows": self.rows_LD[start:stop].clone(), "index": self.index_L[start:stop].clone()}
        return {"sharded": mine, "pushed": self.pushed}

    def load_state_dict(self, state: dict[str, Any], num_images: int) -> None:
        """Take back what `state_dict` gave, re-split for this number of ranks.

        Args:
            state: of the same global queue.
            num_images: of the dataset.

        Raises:
            UserError: a queue of another size, or of other images.
        """
        mine = {name: state["sharded"][name].to(self.rows_LD.device) for name in ("rows", "index")}
        rows_LD, index_L = dist.all_gather_cat(mine["rows"]), dist.all_gather_cat(mine["index"])
        if rows_LD.shape != self.rows_LD.shape:
            found, expected = ("{} x {}".format(*x.shape) for x in (rows_LD, self.rows_LD))
            raise UserError(f"the checkpoint's queue is {found} and not {expected}: give the flags it was made with")
        largest = int(index_L.max())
        if largest >= num_images:
            raise UserError(
                f"the checkpoint's queue holds image number {largest} of a dataset that has {num_images}: "
                "it was made from other images, give the same --data_path"
            )
        self.rows_LD.copy_(rows_LD)
        self.index_L.copy_(index_L)
        self.pushed = int(state["pushed"])
