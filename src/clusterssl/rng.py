"""Counter-based random numbers: every draw is a pure function of (seed, epoch, dataset position, slot).

There is no generator state, so draws do not depend on the order in which images are visited, nor on ranks, workers,
batches or restarts. The hash is the finaliser of SplitMix64 (Steele, Lea, Flood 2014), applied to whole arrays.

Suffixes: N images, S slots (numbers drawn for one image).
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)
_MASK = (1 << 64) - 1


class Stream(IntEnum):
    """What the numbers are for; streams never share draws."""

    CROPS = 1
    ORDER = 2
    SPLIT = 3
    PIXELS = 4
    KMEANS = 5
    BALANCE = 6
    LABELS = 7
    DROPOUT = 8
    DETECTION = 9


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * _MIX1
    z = (z ^ (z >> np.uint64(27))) * _MIX2
    return z ^ (z >> np.uint64(31))


def uniform(seed: int, stream: Stream, epoch: ArrayLike, index: ArrayLike, slots: int) -> NDArray[np.float64]:
    """Draws `slots` numbers for each image.

    Args:
        seed: seed of the run, any integer.
        stream: purpose of the draws.
        epoch: integer, or one per image [N].
        index: dataset positions [N].
        slots: S, numbers per image.

    Returns:
        float64 [N, S], uniform in [0, 1).
    """
    key = np.array([seed & _MASK], dtype=np.uint64)
    for part in (np.array([int(stream)]), np.asarray(epoch), np.asarray(index)):
        key = _mix(key + _GOLDEN * (part.astype(np.uint64).reshape(-1) + np.uint64(1)))
    counter = _GOLDEN * np.arange(1, slots + 1, dtype=np.uint64)
    bits = _mix(key[:, None] + counter[None, :])
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(seed: int, stream: Stream, epoch: int, n: int) -> NDArray[np.int64]:
    """Random order of 0..n-1, int64 [n]; the same on every machine and with every numpy version."""
    keys = uniform(seed, stream, epoch, np.arange(n), 1)[:, 0]
    return np.argsort(keys, kind="stable")
