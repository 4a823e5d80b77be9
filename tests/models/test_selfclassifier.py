"""Self-Classifier's network: golden forward, published names, weight normalisation, precision."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from torch import Tensor

from clusterssl.errors import UserError
from clusterssl.models.selfclassifier import MLPHead, SelfClassifierNet, WeightNormLinear, build_selfclassifier
from clusterssl.models.weights import load_published, published_state_dict
from tests.models.golden import fill_sha256, filled, images, networks, published_names, shapes_of

GOLDEN = {"sc_resnet18": "resnet18", "sc_resnet50": "resnet50", "sc_3layer_nobn_relu": "resnet18"}


def golden_net(name: str) -> SelfClassifierNet:
    """The golden network with its weights, float64, in evaluation mode."""
    options = json.loads(str(networks()[f"{name}_params"]))
    options = {k: v for k, v in options.items() if k not in ("num_cls", "backbone_dim")}
    net = build_selfclassifier(GOLDEN[name], "imagenet", **options).double()
    shapes = {key.removeprefix("module."): tuple(t.shape) for key, t in published_state_dict(net).items()}
    state = filled(shapes)
    assert fill_sha256(state) == str(networks()[f"{name}_filled_sha256"])
    load_published(net, state)
    return net.eval()


def tiny(sizes: tuple[int, ...] = (5, 7), **options: object) -> SelfClassifierNet:
    return build_selfclassifier("conv4w8", "small", sizes, **{"hidden_dim": 12, "dim": 6, **options})


def close(got: Tensor, name: str) -> None:
    expected = networks()[name]
    np.testing.assert_allclose(got.numpy().reshape(expected.shape), expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("name", ["sc_resnet18", "sc_resnet50"])
def test_outputs_are_the_published_ones(name: str) -> None:
    net = golden_net(name)
    crops = [images(f"sc:{i}", 2, 3, size, size) for i, size in enumerate(networks()["sc_input_sizes"].tolist())]
    e_ND, logits = net(crops)
    close(e_ND, f"{name}_eval_embeddings")
    for head, logits_NK in enumerate(logits):
        close(logits_NK, f"{name}_eval_logits{head}")
    close(net.embeddings(crops), f"{name}_eval_embeddings")
    close(net.classify(e_ND)[1], f"{name}_eval_logits1")
    assert torch.equal(net.predict(crops[0], head=1), logits[1][:2].argmax(1))


@torch.no_grad()
def test_head_of_three_layers_without_batch_norm() -> None:
    name = "sc_3layer_nobn_relu"
    size = int(networks()["sc_input_sizes"][0])
    close(golden_net(name).embeddings([images("sc:0", 2, 3, size, size)]), f"{name}_eval_embeddings")


def test_names_and_shapes_equal_the_published_file() -> None:
    with torch.device("meta"):
        net = build_selfclassifier("resnet50", "imagenet", (1000, 2000, 4000, 8000))
    published = published_names()["selfclassifier_resnet50"]
    assert list(shapes_of(published_state_dict(net)).items()) == list(published.items())
    assert all(name.startswith("module.") for name in published_state_dict(net))


@pytest.mark.parametrize(
    ("table", "options"),
    [
        ("selfclassifier_head_3_layers", {"num_hidden": 3}),
        ("selfclassifier_head_2_layers_nobn", {"num_hidden": 2, "use_bn": False}),
    ],
)
def test_names_of_other_heads(table: str, options: dict[str, object]) -> None:
    with torch.device("meta"):
        head = MLPHead(2048, **options)
    got = {f"mlp_head.{name}": shape for name, shape in shapes_of(head.state_dict()).items()}
    assert got == published_names()[table]


@pytest.mark.parametrize(("num_hidden", "names", "dim"), [(0, set(), 64), (1, {"mlp.weight", "mlp.bias"}, 6)])
def test_short_heads(num_hidden: int, names: set[str], dim: int) -> None:
    net = tiny(num_hidden=num_hidden)
    assert set(net.mlp_head.state_dict()) == names
    assert net.embeddings([torch.randn(2, 3, 16, 16)]).shape == (2, dim)
    assert net.cls_0.weight_v.shape == (5, dim)


@pytest.mark.parametrize("name", ["sc_resnet18", "sc_3layer_nobn_relu"])
def test_initialisation_statistics(name: str) -> None:
    torch.manual_seed(5)
    options = json.loads(str(networks()[f"{name}_params"]))
    options = {k: v for k, v in options.items() if k not in ("num_cls", "backbone_dim")}
    net = build_selfclassifier(GOLDEN[name], "imagenet", **options)
    state = net.state_dict()
    keys = networks()[f"{name}_init_keys"].tolist()
    assert keys == [key for key in state if not key.endswith("num_batches_tracked")]
    for key, row in zip(keys, networks()[f"{name}_init_numel_mean_std_min_max"], strict=True):
        numel, mean, std, low, high = row
        x = state[key].flatten()
        if low == high:
            assert x.unique().tolist() == [mean], key
            continue
        assert abs(x.mean() - mean) < 6 * std * (2 / numel) ** 0.5, key
        assert abs(x.std() - std) < 6 * std * numel**-0.5, key


def test_rows_are_g_times_unit_directions_and_both_learn() -> None:
    layer = WeightNormLinear(6, 4).double()
    with torch.no_grad():
        layer.weight_g.copy_(torch.tensor([[1.0], [2], [3], [4]]))
    torch.testing.assert_close(layer.weight.norm(dim=1), torch.tensor([1.0, 2, 3, 4], dtype=torch.float64))
    reference = torch.nn.Linear(6, 4, bias=False).double()
    reference.weight.data = layer.weight_v.detach().clone()
    reference = torch.nn.utils.parametrizations.weight_norm(reference)
    with torch.no_grad():
        reference.parametrizations.weight.original0.copy_(layer.weight_g)
    x = torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), reference(x))
    layer(x).square().sum().backward()
    reference(x).square().sum().backward()
    torch.testing.assert_close(layer.weight_g.grad, reference.parametrizations.weight.original0.grad)
    torch.testing.assert_close(layer.weight_v.grad, reference.parametrizations.weight.original1.grad)


def test_fixed_classifiers_get_no_gradient() -> None:
    net = tiny(fixed_cls=True)
    sum(logits.square().sum() for logits in net([torch.randn(4, 3, 16, 16)])[1]).backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == [
        f"cls_{i}.weight_{x}" for i in range(2) for x in "gv"
    ]


def test_replaced_embeddings_are_classified_and_the_own_ones_returned() -> None:
    net = tiny().eval()
    crops = [torch.randn(3, 3, 16, 16)]
    e_ND, logits = net(crops, replace=lambda e_ND: e_ND.flip(0))
    torch.testing.assert_close(e_ND, net(crops)[0])
    torch.testing.assert_close(logits[0], net(crops)[1][0].flip(0))


def test_zero_embedding_is_finite_and_rows_are_unit() -> None:
    net = tiny(num_hidden=1)
    torch.nn.init.zeros_(net.mlp_head.mlp.weight)
    assert torch.equal(net.embeddings([torch.randn(2, 3, 16, 16)]), torch.zeros(2, 6))
    e_ND = tiny().embeddings([torch.randn(3, 3, 16, 16), torch.randn(3, 3, 8, 8)])
    torch.testing.assert_close(e_ND.norm(dim=1), torch.ones(6))


def test_logits_are_float32_inside_autocast_and_networks_can_be_copied() -> None:
    net = tiny()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        e_ND, logits = net([torch.randn(4, 3, 16, 16)])
    assert e_ND.dtype == logits[0].dtype == logits[1].dtype == torch.float32
    net.eval()
    crops = [torch.randn(2, 3, 16, 16)]
    torch.testing.assert_close(copy.deepcopy(net)(crops)[1], net(crops)[1])


def test_impossible_sizes_and_heads_are_one_line() -> None:
    with pytest.raises(UserError, match="--cls_size 5 0"):
        tiny((5, 0))
    with pytest.raises(UserError, match="--num_hidden -1"):
        tiny(num_hidden=-1)
    with pytest.raises(UserError, match="head 2: this network has heads 0 to 1"):
        tiny().eval().predict(torch.randn(1, 3, 16, 16), head=2)
    with pytest.raises(UserError, match="no head"):
        tiny(()).eval().predict(torch.randn(1, 3, 16, 16))
