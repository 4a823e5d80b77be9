"""Golden networks: the weight-filling rule of the golden vectors in numpy, independent of the package."""

from __future__ import annotations

import functools
import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).resolve().parent.parent / "golden"


_CHUNK = 1 << 16  # what fits into a processor's cache


@functools.cache
def networks() -> dict[str, Any]:
    """Arrays of networks_forward.npz."""
    with np.load(GOLDEN / "networks_forward.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


@functools.cache
def published_names() -> dict[str, dict[str, str]]:
    """Names and shapes ("64x3x7x7") of the published files."""
    tables: dict[str, dict[str, str]] = json.loads((GOLDEN / "published_names.json").read_text())
    return tables


def uniform(key: str, n: int) -> np.ndarray:
    """n numbers in [0, 1): splitmix64 of crc32(key) * 2^32 + i."""
    u = np.empty(n)
    for start in range(0, n, _CHUNK):
        i = np.arange(start, min(start + _CHUNK, n), dtype=np.uint64)
        with np.errstate(over="ignore"):
            z = i + np.uint64(zlib.crc32(key.encode()) << 32)
            z += np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z = z ^ (z >> np.uint64(31))
        u[start : start + len(i)] = (z >> np.uint64(11)).astype(np.float64) / 2.0**53
    return u


def signed(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers in [-1, 1) in C order of the tensor."""
    s = uniform(key, int(np.prod(shape)))
    s *= 2
    s -= 1
    return s.reshape(shape)


def filled(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Float64 state dict by the rule; keys are the published flat names without "module."."""
    return {key: torch.from_numpy(_fill(key, shape)) for key, shape in shapes.items()}


_EDGE = np.array([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])
FIXED = {
    "0.weight": np.full((1, 3, 1, 1), float(np.float32(1 / 3))),
    "0.bias": np.zeros(1),
    "1.weight": np.stack([_EDGE, _EDGE.T])[:, None],
    "1.bias": np.zeros(2),
}
"""published values of the Sobel filters"""


def _fill(key: str, shape: tuple[int, ...]) -> np.ndarray:
    if key.endswith("num_batches_tracked"):
        return np.zeros(shape, dtype=np.int64)
    if "sobel" in key:
        return FIXED[key.rpartition("sobel.")[2]]
    s = signed(key, shape)
    if key.endswith("weight_g"):
        return 1 + 0.1 * s
    if key.endswith("running_mean"):
        return 0.1 * s
    if key.endswith("running_var"):
        return 1.25 + 0.25 * s
    if len(shape) >= 2:
        s *= np.sqrt(6 / (s.size / shape[0]))
        return s
    return 1 + 0.1 * s if key.endswith("weight") else 0.1 * s


def fill_sha256(state: dict[str, Tensor]) -> str:
    """Hash over sorted keys: key bytes, then the values as float64 bytes."""
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode())
        digest.update(state[key].numpy().astype(np.float64, copy=False).data)
    return digest.hexdigest()


def images(name: str, *shape: int) -> Tensor:
    """Golden input of that name, float64."""
    return torch.from_numpy(signed(f"input:{name}", shape))


def shapes_of(state: dict[str, Tensor]) -> dict[str, str]:
    """Names without "module." and shapes as in `published_names`."""
    return {name.removeprefix("module."): "x".join(map(str, tensor.shape)) for name, tensor in state.items()}
