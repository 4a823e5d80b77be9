"""Which images come when: positions computed from (seed, epoch), so that there is no state to save.

Suffixes: S optimizer steps, G images of a global batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from clusterssl.rng import Stream, permutation

Key = tuple[int, int]
_EPOCHS = 2**32
"""more than the epochs of any run: what keeps the draws of an image that comes twice apart"""


def epoch_batches(n: int, global_batch: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The global batches of an epoch: a random order of all n images, cut; the incomplete last one is dropped.

    Args:
        n: images in the dataset.
        global_batch: G, images of one optimizer step over all ranks.
        seed: seed of the run.
        epoch: number of the epoch.

    Returns:
        int64 [S, G] dataset positions; does not depend on the number of ranks.
    """
    steps = n // global_batch
    return permutation(seed, Stream.ORDER, epoch, n)[: steps * global_batch].reshape(steps, global_batch)


class PositionSampler(Sampler[list[Key]]):
    """Batch sampler: lists of (epoch, dataset position), one per micro-batch of this rank.

    Rank r takes the r-th contiguous slice of every global batch, and cuts it into `accumulate` micro-batches. Set
    `epoch`, `start` (optimizer step to begin with) and, where not all images come once, `order` before iterating. The
    second time that `order` names an image its key differs from the first, so that its crops do.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        *,
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        images_per_epoch: int | None = None,
    ) -> None:
        self.n = n
        self.images = n if images_per_epoch is None else images_per_epoch
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.epoch = 0
        self.start = 0
        self.order: NDArray[np.int64] | None = None

    @property
    def global_batch(self) -> int:
        """G, images of one optimizer step over all ranks."""
        return self.batch_size * self.accumulate * self.world_size

    @property
    def steps(self) -> int:
        """Optimizer steps of a whole epoch."""
        return self.images // self.global_batch

    def __len__(self) -> int:
        return max(self.steps - self.start, 0) * self.accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        share = self.batch_size * self.accumulate
        mine = slice(self.rank * share, (self.rank + 1) * share)
        positions_SG, times_SG = self._epoch()
        keys_SG = self.epoch + times_SG * _EPOCHS
        for keys, row in zip(keys_SG[self.start :, mine], positions_SG[self.start :, mine], strict=True):
            pairs = list(zip(keys.tolist(), row.tolist(), strict=True))
            for first in range(0, share, self.batch_size):
                yield pairs[first : first + self.batch_size]

    def _epoch(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Positions [S, G] and how often each came before in this epoch [S, G]."""
        if self.order is None:
            positions_SG = epoch_batches(self.n, self.global_batch, self.seed, self.epoch)
            return positions_SG, np.zeros_like(positions_SG)
        used = self.order[: self.steps * self.global_batch]
        return used.reshape(self.steps, -1), times_before(used).reshape(self.steps, -1)


def times_before(values_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """How often each value occurred before its place, int64 [N]."""
    by_value = np.argsort(values_N, kind="stable")
    ordered = values_N[by_value]
    first_of_run = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    run_lengths = np.diff(np.r_[first_of_run, len(ordered)])
    times = np.empty(len(values_N), dtype=np.int64)
    times[by_value] = np.arange(len(values_N)) - np.repeat(first_of_run, run_lengths)
    return times
