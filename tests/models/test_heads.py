"""Heads and prototypes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from clusterssl.models.heads import MultiPrototypes, normalize_rows_, projection_head, prototypes


@pytest.mark.parametrize(
    ("hidden", "out", "norm", "names"),
    [
        (8, 4, True, ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"]),
        (8, 4, False, ["0.weight", "0.bias", "2.weight", "2.bias"]),
        (0, 4, True, ["weight", "bias"]),
        (8, 0, True, []),
    ],
)
def test_head_has_the_published_names(hidden: int, out: int, norm: bool, names: list[str]) -> None:
    head = projection_head(6, hidden, out, norm)
    assert [name for name, _ in head.named_parameters()] == names
    assert head(torch.randn(5, 6)).shape == (5, out or 6)


def test_head_computes_linear_norm_relu_linear() -> None:
    head = projection_head(6, 8, 4).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    w = {name: tensor.detach().numpy() for name, tensor in head.named_parameters()}
    y = x.numpy() @ w["0.weight"].T + w["0.bias"]
    y = (y - y.mean(0)) / np.sqrt(y.var(0) + 1e-5) * w["1.weight"] + w["1.bias"]
    y = np.maximum(y, 0) @ w["3.weight"].T + w["3.bias"]
    np.testing.assert_allclose(head(x).detach().numpy(), y, atol=1e-10)


def test_one_and_several_layers() -> None:
    one = prototypes(4, 7)
    assert isinstance(one, nn.Linear) and list(one.state_dict()) == ["weight"]
    many = prototypes(4, [5, 7])
    assert isinstance(many, MultiPrototypes)
    assert list(many.state_dict()) == ["prototypes0.weight", "prototypes1.weight"]
    z = torch.randn(3, 4)
    for i, scores in enumerate(many(z)):
        torch.testing.assert_close(scores, z @ many[i].weight.T)
    assert len(many) == 2 and [layer.out_features for layer in many] == [5, 7]
    assert prototypes(4, 0)(z) == []


def test_rows_become_unit_in_place_without_gradient() -> None:
    layer = nn.Linear(4, 3, bias=False)
    parameter, before = layer.weight, layer.weight.detach().clone()
    normalize_rows_(layer)
    assert layer.weight is parameter and parameter.requires_grad and parameter.grad_fn is None
    torch.testing.assert_close(parameter.detach(), before / before.norm(dim=1, keepdim=True))
