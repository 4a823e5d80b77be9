"""Features inside a network against slices of it run by hand; several probes at once against each alone."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clusterssl.errors import UserError
from clusterssl.evals.classifier import evaluate_probes, steps_in_memory, train_probes
from clusterssl.evals.layers import LayerFeatures, Probes
from clusterssl.models.build import build_backbone

CPU = torch.device("cpu")


def images(count: int = 2, side: int = 224) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def alexnet() -> nn.Module:
    torch.manual_seed(0)
    return build_backbone("deepcluster_alexnet").eval()


@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_alexnet_as_published(alexnet: nn.Module, pooling: str) -> None:
    layers = [f"conv{k}" for k in range(1, 6)]
    features = LayerFeatures(alexnet, layers, pooling=pooling, image_size=(224, 224))
    assert [math.prod(features.shapes[layer]) for layer in layers] == [9600, 9216, 9600, 9600, 9216]
    pools = {1: (6, 6, 3), 2: (4, 4, 0), 3: (3, 3, 1), 4: (3, 3, 1), 5: (2, 2, 0)}
    with torch.no_grad():
        found = features(images())
        expected, x, number = [], images(), 0
        for layer in alexnet.features:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                number += 1
                pool = F.avg_pool2d if pooling == "avg" else F.max_pool2d
                expected.append(pool(x, *pools[number]).flatten(1))
    assert torch.allclose(found, torch.cat(expected, dim=1), atol=1e-6)


def test_stages_of_a_resnet() -> None:
    torch.manual_seed(0)
    for arch, stem in (("resnet18", "imagenet"), ("resnet18", "small")):
        net, x = build_backbone(arch, stem).eval(), images(side=64)
        layers = ("layer2", "layer4")
        features = LayerFeatures(net, layers, image_size=(64, 64))
        with torch.no_grad():
            found = features(x)
            x = net.layer2(net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(x))))))
            second, fourth = x, net.layer4(net.layer3(x))
        grids = [min(math.isqrt(9600 // x.shape[1]), x.shape[2]) for x in (second, fourth)]
        expected = [F.adaptive_avg_pool2d(x, grid) for x, grid in zip((second, fourth), grids, strict=True)]
        assert [tuple(x.shape[1:]) for x in expected] == [features.shapes[layer] for layer in layers]
        assert torch.allclose(found, torch.cat([x.flatten(1) for x in expected], dim=1), atol=1e-5)


def test_about_as_many_features_from_every_stage_of_resnet50() -> None:
    with torch.device("meta"):
        net = build_backbone("resnet50")
        features = LayerFeatures(net, [f"layer{k}" for k in range(1, 5)], image_size=(224, 224))
    assert [math.prod(shape) for shape in features.shapes.values()] == [9216, 8192, 9216, 8192]


def test_the_small_network() -> None:
    torch.manual_seed(0)
    net, x = build_backbone("conv4w4", "small").eval(), images(side=32)
    features = LayerFeatures(net, ["conv1", "conv4"], pooling="max", image_size=(32, 32))
    with torch.no_grad():
        found = features(x)
        first = F.relu(F.max_pool2d(net.bn1(net.conv1(x)), 2))
        last = net.forward_map(x)
    assert features.shapes == {"conv1": (4, 16, 16), "conv4": (32, 4, 4)}
    assert torch.allclose(found, torch.cat([first.flatten(1), last.flatten(1)], dim=1), atol=1e-6)


def test_numbered_trunk_vgg_and_submodules_by_name() -> None:
    with torch.device("meta"):
        vgg = build_backbone("deepcluster_vgg16")
        assert LayerFeatures(vgg, ["conv13"], image_size=(224, 224)).shapes["conv13"][0] == 512
        numbered = build_backbone("sela_resnetv2")
        assert LayerFeatures(numbered, ["layer3"], image_size=(224, 224)).shapes["layer3"][0] == 1024
        other = build_backbone("mobilenet_v2")
        assert LayerFeatures(other, ["features.3"], image_size=(64, 64)).shapes["features.3"] == (24, 16, 16)


@pytest.mark.parametrize(
    ("arch", "layer", "message"),
    [
        ("conv4w4", "conv5", "no such layer in this architecture; choose conv1 to conv4"),
        ("conv4w4", "bn1", "choose conv1 to conv4"),
        ("resnet18", "layer5", "choose layer1 to layer4"),
        ("resnet18", "conv9", "choose layer1 to layer4"),
        ("vit_tiny", "blocks.3", "gives no feature map"),
    ],
)
def test_layers_that_are_not_there(arch: str, layer: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        LayerFeatures(build_backbone(arch, "small"), [layer], image_size=(64, 64))


def points() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(3, (53,), generator=generator)
    return torch.randn(3, 20, generator=generator)[labels] + torch.randn(53, 20, generator=generator), labels


@pytest.mark.parametrize("batch_norm", [False, True])
def test_probes_trained_together_are_those_trained_alone(batch_norm: bool) -> None:
    x, y = points()
    shapes = {"conv1": (3, 2, 2), "layer.2": (8, 1, 1)}
    columns = {"conv1": slice(0, 12), "layer.2": slice(12, 20)}
    both = Probes(shapes, 3, batch_norm=batch_norm, init="default", seed=3)
    alone = {}
    for layer, shape in shapes.items():
        alone[layer] = Probes({layer: shape}, 3, batch_norm=batch_norm, seed=9)
        key = layer.replace(".", "_")
        alone[layer].linear[key].load_state_dict(both.linear[key].state_dict())
    optimizers = {id(net): torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9) for net in (both, *alone.values())}
    for epoch in range(3):
        order = torch.randperm(53, generator=torch.Generator().manual_seed(epoch))
        together = train_probes(both, optimizers[id(both)], steps_in_memory(x, y, order, 8), CPU)
        tested = evaluate_probes(both, [(x, y)], CPU)
        for number, (layer, net) in enumerate(alone.items()):
            part = x[:, columns[layer]]
            (single,) = train_probes(net, optimizers[id(net)], steps_in_memory(part, y, order, 8), CPU)
            assert together[number] == pytest.approx(single, rel=1e-5)
            assert tested[number] == pytest.approx(evaluate_probes(net, [(part, y)], CPU)[0], rel=1e-5)
    assert together[0] != together[1]


def test_initial_weights() -> None:
    shapes = {"conv1": (50, 2, 2)}
    std = {"normal": 0.01, "xavier": math.sqrt(2 / 700), "default": math.sqrt(1 / 600)}
    for init, expected in std.items():
        linear = Probes(shapes, 500, init=init).linear["conv1"]
        assert float(linear.weight.std()) == pytest.approx(expected, rel=0.02)
        assert bool(linear.bias.any()) == (init == "default")


def test_ten_crops() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 10, 12, generator=generator), torch.tensor([0, 1, 2, 0, 1, 2])
    probes = Probes({"a": (3, 2, 2)}, 3, seed=5)
    probes.linear["a"].weight.data.mul_(100)
    logits = probes(x.flatten(0, 1)).view(6, 10, 3)
    for kind, mean, plain in (
        ("softmax", logits.softmax(2).mean(1), logits[:, 4]), ("logits", logits.mean(1), logits.mean(1)),
    ):  # fmt: skip
        (found,) = evaluate_probes(probes, [(x[:4], y[:4]), (x[4:], y[4:])], CPU, kind)
        assert found.top1 == pytest.approx(100 * float((mean.argmax(1) == y).float().mean()))
        assert found.loss == pytest.approx(float(F.cross_entropy(plain, y)), rel=1e-5)
