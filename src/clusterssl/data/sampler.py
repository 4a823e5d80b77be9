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
    `epoch` and `start` (optimizer step to begin with) before iterating.
    """

    def __init__(
        self, n: int, batch_size: int, *, accumulate: int = 1, rank: int = 0, world_size: int = 1, seed: int = 0
    ) -> None:
        self.n = n
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.epoch = 0
        self.start = 0

    @property
    def global_batch(self) -> int:
        """G, images of one optimizer step over all ranks."""
        return self.batch_size * self.accumulate * self.world_size

    @property
    def steps(self) -> int:
        """Optimizer steps of a whole epoch."""
        return self.n // self.global_batch

    def __len__(self) -> int:
        return max(self.steps - self.start, 0) * self.accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        epoch = self.epoch
        share = self.batch_size * self.accumulate
        mine = slice(self.rank * share, (self.rank + 1) * share)
        for row in epoch_batches(self.n, self.global_batch, self.seed, epoch)[self.start :, mine]:
            for micro in row.reshape(self.accumulate, self.batch_size).tolist():
                yield [(epoch, i) for i in micro]
