"""The compiled augmentation: the numbers of the eager one, from one graph for each crop size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from clusterssl.compiling import require_compiler
from clusterssl.data import Augment, MultiCrop
from clusterssl.data.params import Param
from clusterssl.errors import UserError

SIZES = ((16, 16), (9, 14))


@pytest.fixture
def compiler() -> None:
    """A C++ compiler."""
    try:
        require_compiler(torch.device("cpu"))
    except UserError as error:
        pytest.skip(str(error))


def case(rows: int, seed: int, **more: float) -> tuple[list[Tensor], Tensor]:
    """Crops of two sizes and drawn parameters."""
    multicrop = MultiCrop((2, 1), SIZES, (0.3, 0.1), (1.0, 0.3), **more)  # type: ignore[arg-type]
    drawn = multicrop.params(multicrop.uniforms(seed, 0, np.arange(rows)))
    generator = torch.Generator().manual_seed(seed)
    crops = [
        torch.randint(0, 256, (rows, 3, *size), dtype=torch.uint8, generator=generator) for size in multicrop.sizes
    ]
    crops[0][0], crops[1][0] = 0, 255
    return crops, torch.from_numpy(np.ascontiguousarray(drawn.swapaxes(0, 1)))


def difference(ours: list[Tensor], expected: list[Tensor], params: Tensor) -> float:
    """Largest one; of solarized images where the threshold does not fall between the two."""
    worst = 0.0
    for view, (a, b) in enumerate(zip(ours, expected, strict=True)):
        gap = (a - b).abs()
        dark = params[view, :, Param.SOLARIZE] > 0
        assert (gap[dark] > 1e-4).float().mean() < 1e-3 if dark.any() else True
        worst = max(worst, float(gap[~dark].max()) if (~dark).any() else 0.0)
    return worst


@pytest.mark.slow
def test_numbers_and_graphs(compiler: None) -> None:
    torch._dynamo.reset()
    counters.clear()
    fused, eager = Augment().fuse(torch.channels_last), Augment()
    strong = {"color_jitter_p": 1.0, "gray_p": 0.5, "blur_p": 1.0, "solarize_p": 0.5}
    weak = {"color_jitter_p": 0.0, "gray_p": 0.0, "blur_p": 0.0, "flip_p": 0.0}
    cases = [case(rows, rows) for rows in (6, 64, 1, 2, 3)] + [case(12, 1, **strong), case(12, 1, **weak)]
    for crops, params in cases:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours = fused(crops, params)
        expected = eager(crops, params)
        assert difference(ours, expected, params) < 2e-5
        for a, b in zip(ours, expected, strict=True):
            assert a.shape == b.shape and a.dtype == torch.float32 and not a.requires_grad
            assert a.is_contiguous(memory_format=torch.channels_last)
    assert counters["stats"]["unique_graphs"] == len(SIZES)
    assert not counters["graph_break"]


@pytest.mark.gpu
def test_numbers_and_graphs_on_a_gpu() -> None:
    require_compiler(torch.device("cuda"))
    torch._dynamo.reset()
    counters.clear()
    fused, eager = Augment().fuse(torch.channels_last).cuda(), Augment().cuda()
    strong = {"color_jitter_p": 1.0, "gray_p": 0.5, "blur_p": 1.0, "solarize_p": 0.5}
    for crops, params in [case(rows, rows) for rows in (6, 64, 1, 2, 3)] + [case(12, 1, **strong)]:
        there = [crop.cuda() for crop in crops]
        with torch.autocast("cuda", dtype=torch.bfloat16):
            ours = fused(there, params)
        assert all(x.is_cuda and x.is_contiguous(memory_format=torch.channels_last) for x in ours)
        for expected in (eager(there, params), eager(crops, params)):
            assert difference([x.cpu() for x in ours], [x.cpu() for x in expected], params) < 1e-4
    assert counters["stats"]["unique_graphs"] == len(SIZES)
    assert not counters["graph_break"]
