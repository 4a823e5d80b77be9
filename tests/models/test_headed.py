"""Backbone under linear heads: names, new heads of other sizes, the ReLU before them, cluster ids."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from clusterssl.errors import UserError
from clusterssl.models.build import build_model
from clusterssl.models.headed import HeadedNet, build_headed
from clusterssl.models.weights import flat_state_dict, load_published, published_state_dict


def tiny(*sizes: int, **options: object) -> HeadedNet:
    return build_headed("conv4w8", "small", sizes, **options)


def crops(*sides: int) -> list[torch.Tensor]:
    return [torch.randn(3, 3, side, side) for side in sides]


@pytest.mark.parametrize(("sizes", "names"), [((), []), ((5,), ["top_layer"]), ((5, 7), ["top_layer0", "top_layer1"])])
def test_heads_have_the_published_names(sizes: tuple[int, ...], names: list[str]) -> None:
    net = tiny(*sizes)
    published = published_state_dict(net)
    assert [n for n in published if n.startswith("top_layer")] == [
        f"{n}.{p}" for n in names for p in ("weight", "bias")
    ]
    assert "conv1.weight" in published
    assert [head.out_features for head in net.heads()] == list(sizes)
    features_NF, logits = net(crops(16))
    assert features_NF.shape == (3, 64) and [x.shape for x in logits] == [(3, size) for size in sizes]


def test_rows_are_crop_major_and_one_size_is_one_pass() -> None:
    net = tiny(5, 7)
    views = crops(16, 16, 8)
    net(views)
    assert net.backbone.bn1.num_batches_tracked == 2
    net.eval()
    features_NF, logits = net(views)
    for v, crop in enumerate(views):
        torch.testing.assert_close(net([crop])[0], features_NF[3 * v : 3 * v + 3], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(net([crop])[1][1], logits[1][3 * v : 3 * v + 3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("relu", [False, True])
def test_heads_see_the_features_through_a_relu_when_asked(relu: bool) -> None:
    net = tiny(5, relu_before_heads=relu).eval()
    x_NF = torch.randn(4, 64)
    torch.testing.assert_close(net.logits(x_NF)[0], net.top_layer(F.relu(x_NF) if relu else x_NF))
    torch.testing.assert_close(net(crops(16))[1][0].shape, torch.Size([3, 5]))


def test_cluster_ids_are_those_of_the_largest_logit() -> None:
    net = tiny(5, 7).eval()
    images = torch.randn(6, 3, 16, 16)
    ids_B = net.predict(images, head=1)
    assert ids_B.dtype == torch.int64 and torch.equal(ids_B, net([images])[1][1].argmax(1))
    other = build_model("conv4w8", "small", 12, 6, (5, 4)).eval()
    assert torch.equal(other.predict(images, head=1), other([images])[1][1].argmax(1))
    single = build_model("conv4w8", "small", 12, 6, 5).eval()
    assert torch.equal(single.predict(images), single([images])[1].argmax(1))
    with pytest.raises(UserError, match="head 2: this network has heads 0 to 1"):
        net.predict(images, head=2)
    with pytest.raises(UserError, match="head 0: this network has no head"):
        tiny().predict(images)


def test_new_heads_of_the_same_size_are_the_same_parameters_with_new_values() -> None:
    net = tiny(5)
    weight, before = net.top_layer.weight, net.top_layer.weight.detach().clone()
    net.set_heads([5])
    assert net.top_layer.weight is weight and not torch.equal(weight, before)
    net.set_heads([6, 4])
    assert [name for name, _ in net.named_children()] == ["backbone", "top_layer0", "top_layer1"]
    assert net(crops(16))[1][1].shape == (3, 4)
    net.set_heads([])
    assert net(crops(16))[1] == []


def test_an_optimiser_goes_on_with_a_head_that_changes_size() -> None:
    net = tiny(5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for size in (9, 3):
        net(crops(16))[1][0].sum().backward()
        net.set_heads([size])
        assert net.top_layer.weight.grad is None and net.top_layer.out_features == size
        before = net.top_layer.weight.detach().clone()
        F.cross_entropy(net(crops(16))[1][0], torch.tensor([0, 1, 2])).backward()
        grad = net.top_layer.weight.grad
        optimizer.step()
        torch.testing.assert_close(net.top_layer.weight.detach(), before - 0.1 * grad)
        optimizer.zero_grad()


@pytest.mark.parametrize(("std", "spread", "bias"), [(0.01, 0.01, False), (0.0, (1 / 64 / 3) ** 0.5, True)])
def test_weights_of_new_heads(std: float, spread: float, bias: bool) -> None:
    net = tiny(3000, head_std=std)
    weight = net.top_layer.weight.detach()
    assert abs(weight.std() / spread - 1) < 0.01 and abs(weight.mean()) < spread / 50
    assert bool(net.top_layer.bias.detach().abs().max()) == bias
    if not std:
        assert weight.abs().max() <= 1 / 8 and net.top_layer.bias.detach().abs().max() <= 1 / 8


def test_generator_decides_the_weights() -> None:
    draws = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(draws))
        net = tiny(5)
        net.set_heads([6, 7], torch.Generator().manual_seed(seed))
        draws.append(torch.cat([p.detach().flatten() for head in net.heads() for p in head.parameters()]))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("sizes", [(9,), (5, 7), (2, 2, 2)])
def test_state_dict_with_other_heads_loads(sizes: tuple[int, ...]) -> None:
    source, net = tiny(*sizes), tiny(5)
    net.load_state_dict(source.state_dict())
    assert net.nmb_clusters == sizes
    other = tiny(4, 4)
    load_published(other, published_state_dict(source))
    for loaded in (net, other):
        state = flat_state_dict(loaded)
        assert all(torch.equal(state[name], tensor) for name, tensor in flat_state_dict(source).items())
        assert all(head.weight.requires_grad for head in loaded.heads())


def test_damaged_heads_are_refused_and_nothing_changes() -> None:
    net = tiny(5)
    before = {name: tensor.clone() for name, tensor in flat_state_dict(net).items()}
    for spoil, message in (
        (
            {"top_layer0.weight": torch.zeros(9, 64)},
            "top_layer.bias; 1 unexpected: top_layer0",
        ),
        ({"top_layer.weight": torch.zeros(9, 63), "top_layer.bias": torch.zeros(9)}, "9x63 instead of 9x64"),
        ({"top_layer.bias": torch.zeros(5)}, "missing: top_layer.weight"),
    ):
        trunk = {name: tensor for name, tensor in before.items() if not name.startswith("top_layer")}
        with pytest.raises(UserError, match=message):
            load_published(net, trunk | spoil)
        assert net.nmb_clusters == (5,)
    assert all(torch.equal(tensor, before[name]) for name, tensor in flat_state_dict(net).items())


def test_logits_are_float32_inside_autocast_and_networks_can_be_copied() -> None:
    net = tiny(5, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features_NF, logits = net(crops(16))
    assert features_NF.dtype == torch.bfloat16 and [x.dtype for x in logits] == [torch.float32] * 2
    sum(x.square().sum() for x in logits).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    again = copy.deepcopy(net).eval()
    again.set_heads([2])
    assert net.nmb_clusters == (5, 7) and again(crops(16))[1][0].shape == (3, 2)


def test_heads_without_clusters_are_refused() -> None:
    with pytest.raises(UserError, match="--nmb_clusters 5 0: every head needs at least 1 cluster"):
        tiny(5, 0)
