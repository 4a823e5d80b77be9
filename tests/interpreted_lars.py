"""LARS by its GPU kernel, run by Triton's interpreter on a CPU, on the golden trajectories of `test_optim.py`.

Run by `test_kernels.py` in a process of its own: Triton decides when it is imported what it does with kernels.
"""

from __future__ import annotations

import pytest
import torch

from clusterssl import optim
from clusterssl.lars_kernel import Update
from clusterssl.optim import LARS
from tests import test_optim


@pytest.fixture(autouse=True)
def by_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, float32 only."""
    monkeypatch.setattr(optim, "for_kernels", lambda device, dtype: dtype == torch.float32)


def test_the_golden_trajectory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "_in_turn", None)
    test_optim.test_lars_follows_the_golden_trajectory("float32")


def test_many_shapes_follow_operations_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 2, 3, 3), (20_000,), (1,), (7, 5), (4, 4, 1, 1)]

    def start() -> list[torch.nn.Parameter]:
        again = torch.Generator().manual_seed(1)
        found = [torch.nn.Parameter(torch.randn(shape, generator=again)) for shape in shapes]
        found[0].data = found[0].data.contiguous(memory_format=torch.channels_last)
        return found

    ours, expected = start(), start()
    optimizers = [LARS(params, lr=0.3, weight_decay=1e-2) for params in (ours, expected)]
    for step in range(4):
        grads = [torch.randn(shape, generator=generator) for shape in shapes]
        grads[2] = torch.zeros(1)
        for params in (ours, expected):
            for p, g in zip(params, grads, strict=True):
                p.grad = g.clone(memory_format=torch.preserve_format)
                if p is params[0]:
                    p.grad = p.grad.contiguous(memory_format=torch.channels_last)
                if p is params[3] and step == 0:
                    p.grad = None  # frozen at first
        optimizers[0].step()
        with monkeypatch.context() as patch:
            patch.setattr(optim, "for_kernels", lambda *_: False)
            optimizers[1].step()
        for p, q in zip(ours, expected, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert len(optimizers[0]._kernels) == 2, "with and without what was frozen"


def test_tensors_that_lie_in_memory_otherwise_are_left_to_operations() -> None:
    p, v = torch.randn(4, 3, 2, 2), torch.zeros(4, 3, 2, 2)
    assert Update.fits([p], [p.clone()], [v])
    assert not Update.fits([p], [p.contiguous(memory_format=torch.channels_last)], [v])
    assert not Update.fits([p[:, 1:]], [p[:, 1:]], [v[:, 1:]])
    assert not Update.fits([p.half()], [p.half()], [v.half()])
