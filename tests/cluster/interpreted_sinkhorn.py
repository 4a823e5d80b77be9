"""Sinkhorn-Knopp by GPU kernels, run by Triton's interpreter on a CPU, beside float64 and the published values.

Run by `test_kernels.py` in a process of its own: Triton decides when it is imported what it does with kernels.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clusterssl import dist
from clusterssl.cluster import sinkhorn as module
from clusterssl.cluster import sinkhorn_kernels
from clusterssl.cluster.sinkhorn import sinkhorn
from clusterssl.cluster.sinkhorn_kernels import ByKernels
from tests.cluster.test_sinkhorn import GOLDEN, cosines, reference
from tests.ranks import run_ranks


@pytest.fixture(autouse=True)
def by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    monkeypatch.setattr(module, "for_kernels", lambda device, dtype: dtype == torch.float32)
    monkeypatch.setattr(module, "ByOperations", None)


@pytest.mark.parametrize("key", [key for key in GOLDEN.names() if key[:2] in ("c0", "c1", "c2") and "_q_f4" in key])
def test_equals_the_published_formula(key: str) -> None:
    case, _, _, eps, iterations = key.split("_")
    ours = sinkhorn(torch.from_numpy(GOLDEN[f"{case}_scores_f4"]).contiguous(), float(eps[3:]), int(iterations[2:]))
    torch.testing.assert_close(ours, torch.from_numpy(GOLDEN[key]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("programs", [1, 2, 264])
@pytest.mark.parametrize("rows, prototypes, iterations", [(1, 1, 1), (1, 5, 3), (11, 129, 3), (9, 4, 9)])
def test_equals_float64(
    rows: int, prototypes: int, iterations: int, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinkhorn_kernels, "_PROGRAMS", programs)
    scores = torch.stack([cosines(rows, prototypes, seed=seed) for seed in range(2)])
    for bound in (None, 1.0):
        given = scores.clone()
        ours = sinkhorn(given, 0.05, iterations, bound=bound)
        assert torch.equal(given, scores)
        for plan, one in zip(ours, scores, strict=True):
            np.testing.assert_allclose(plan.numpy(), reference(one.numpy(), 0.05, iterations), rtol=0, atol=4e-6)
        assert torch.equal(sinkhorn(given, 0.05, iterations, bound=bound, overwrite=True), ours)


def test_what_a_kernel_cannot_take_goes_by_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[torch.Tensor] = []
    monkeypatch.setattr(module, "ByOperations", lambda plan: taken.append(plan) or ByKernels(plan.contiguous()))
    wide, across = torch.zeros(2, 2**14 + 1), cosines(6, 4).T
    for number, scores in enumerate((wide, across), 1):
        sinkhorn(scores, 0.05, 1, bound=1.0)
        assert len(taken) == number


def shares(rank: int, world_size: int) -> np.ndarray:
    """A rank's part of a problem that is not shared equally, one rank has nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "for_kernels", lambda *_: True)
        mine = cosines(13, 20).split([8, 5, 0])[rank]
        assert dist.size() == world_size
        return sinkhorn(mine.contiguous(), 0.05, 3, bound=1.0).numpy()


def test_ranks_together_equal_one() -> None:
    whole = np.concatenate(run_ranks(shares, 3))
    np.testing.assert_allclose(whole, reference(cosines(13, 20).numpy(), 0.05, 3), rtol=0, atol=2e-6)
