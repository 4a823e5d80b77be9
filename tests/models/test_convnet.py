"""The four-layer network against the same thing written with functions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from clusterssl.models.build import build_backbone
from clusterssl.models.convnet import convnet, is_convnet


@pytest.mark.parametrize(("arch", "width"), [("conv4", 16), ("conv4w8", 8), ("conv4w32", 32)])
def test_widths(arch: str, width: int) -> None:
    model = build_backbone(arch)
    assert [model.get_submodule(f"conv{i}").out_channels for i in range(1, 5)] == [
        width,
        2 * width,
        4 * width,
        8 * width,
    ]
    assert model.feature_dim == 8 * width


def test_equals_conv_norm_relu_pool_in_the_described_order() -> None:
    torch.manual_seed(0)
    model = convnet("conv4w8").double()
    for i in range(1, 5):  # a gamma below zero tells whether pooling before ReLU is handled right
        torch.nn.init.normal_(model.get_submodule(f"bn{i}").weight)
    state = model.state_dict()
    x = torch.randn(3, 3, 32, 24, dtype=torch.float64)
    y = x
    for i in range(1, 5):
        y = F.conv2d(y, state[f"conv{i}.weight"], padding=1)
        y = (y - y.mean((0, 2, 3), keepdim=True)) / (y.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
        y = (y * state[f"bn{i}.weight"].view(1, -1, 1, 1) + state[f"bn{i}.bias"].view(1, -1, 1, 1)).relu()
        y = F.max_pool2d(y, 2) if i < 4 else y
    torch.testing.assert_close(model.forward_map(x), y, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model(x), y.mean((2, 3)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("arch", ["conv4", "conv4w1", "conv4w128"])
def test_names(arch: str) -> None:
    assert is_convnet(arch)


@pytest.mark.parametrize("arch", ["conv", "conv4w", "conv4w0", "conv4w-8", "conv4w8x", "xconv4", "conv4\n"])
def test_other_names(arch: str) -> None:
    assert not is_convnet(arch)
