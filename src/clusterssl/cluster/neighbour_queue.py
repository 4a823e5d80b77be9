"""A queue of past embeddings in which an image finds its nearest neighbour among other images.

NNCLR (Dwibedi et al. 2021, arXiv 2104.14548) and Self-Classifier (Amrani et al. 2022, arXiv 2103.10994) replace a view
by its neighbour. Every rank holds the same queue, because all ranks put in the embeddings of all; a checkpoint holds
each row once, in the shard of one rank.

Shape suffixes: L places in the queue, B images of this rank, D feature dimension.
"""

from __future__ import annotations

from collections.abc import Callable
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
        self._rows_LD = torch.zeros(length, dim, device=device, dtype=dtype)
        self._index_L = torch.full((length,), _EMPTY, device=device, dtype=torch.int64)
        self.pushed = 0
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._coming: Callable[[], Tensor] | None = None

    @property
    def full(self) -> bool:
        """Whether every place has been filled at least once."""
        return self.pushed >= len(self._rows_LD)

    @property
    def rows_LD(self) -> Tensor:  # noqa: N802 - its shape
        """Embeddings by place."""
        self._arrive()
        return self._rows_LD

    @property
    def index_L(self) -> Tensor:  # noqa: N802 - its shape
        """Dataset positions by place, -1 where none is."""
        self._arrive()
        return self._index_L

    @torch.no_grad()
    def push(self, z_BD: Tensor, index_B: Tensor, *, more: bool = False) -> None:
        """Put in the embeddings of all ranks, in rank order, which is their order in the global batch.

        They travel while the step goes on, and are in their places when the queue is next looked at.

        Args:
            z_BD: embeddings of this rank, as many as on the others.
            index_B: dataset positions of their images, int64.
            more: further micro-batches of this step follow; all of them enter with the last.
        """
        self._waiting.append((z_BD.detach().to(self._rows_LD.dtype), index_B))
        if more:
            return
        self._arrive()
        z_BD, index_B = (torch.cat(part) for part in zip(*self._waiting, strict=True))
        self._waiting = []
        # As bytes, so that numbers of two types are one message.
        self._coming = dist.all_gather_later(torch.cat([_bytes(z_BD), _bytes(index_B[:, None])], dim=1))
        self.pushed += dist.size() * len(index_B)

    def _arrive(self) -> None:
        """Put what was pushed last in its places."""
        if self._coming is None:
            return
        bytes_NC, self._coming = self._coming(), None
        length, count, width = len(self._rows_LD), len(bytes_NC), bytes_NC.shape[1] - self._index_L.element_size()
        kept = min(length, count)
        places = (self.pushed - kept + torch.arange(kept, device=self._index_L.device)) % length
        self._rows_LD[places] = _numbers(bytes_NC[count - kept :, :width], self._rows_LD.dtype)
        self._index_L[places] = _numbers(bytes_NC[count - kept :, width:], torch.int64)[:, 0]

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
        rows_LD, index_L = self.rows_LD, self.index_L
        at_once = max(1, _PRODUCTS // len(rows_LD))
        with torch.autocast(z_BD.device.type, enabled=False):
            for z_CD, index_C in zip(z_BD.split(at_once), index_B.split(at_once), strict=True):
                similarity_CL = z_CD.to(rows_LD.dtype) @ rows_LD.T
                similarity_CL.masked_fill_(index_C[:, None] == index_L, -torch.inf)
                best.append(similarity_CL.argmax(1))
        return rows_LD[torch.cat(best)].to(z_BD.dtype)

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


def _bytes(x_BC: Tensor) -> Tensor:
    return x_BC.contiguous().view(torch.uint8)


def _numbers(bytes_NC: Tensor, dtype: torch.dtype) -> Tensor:
    return bytes_NC.clone(memory_format=torch.contiguous_format).view(dtype)
