"""AlexNet, VGG-16 and ResNets of DeepCluster and SeLa, Self-Classifier's ViT: golden outputs, names, initialisation."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clusterssl.models.build import build_backbone
from clusterssl.models.headed import HeadedNet, build_headed
from clusterssl.models.trunks import absorb_batchnorm
from clusterssl.models.weights import flat_state_dict, load_published, published_state_dict
from tests.models.golden import fill_sha256, filled, images, networks, published_names, shapes_of, signed

GOLDEN = {
    "dc_alexnet": ("sobel:deepcluster_alexnet", (12,)),
    "dc_alexnet_rgb": ("deepcluster_alexnet", (12,)),
    "dc_vgg16": ("sobel:deepcluster_vgg16", (12,)),
    "sela_alexnet_big": ("sela_alexnet", (7, 7)),
    "sela_alexnet_small": ("sela_alexnet_small", (7, 7)),
    "sela_resnetv2": ("sela_resnetv2", (7, 7, 7)),
    "sela_resnetv2_1head": ("sela_resnetv2", (7,)),
    "sela_resnetv1": ("sela_resnetv1", (7, 7)),
}


def golden_key(name: str, key: str) -> str:
    """SeLa's pre-activation ResNet has its only head inside a sequence."""
    return key.replace("top_layer.", "top_layer.0.") if name == "sela_resnetv2_1head" else key


def golden_net(name: str) -> HeadedNet:
    """The golden network with its weights, float64, in evaluation mode."""
    arch, sizes = GOLDEN[name]
    with torch.device("meta"):
        net = build_headed(arch, "imagenet", sizes, relu_before_heads="resnet" not in arch).double()
    state = filled({golden_key(name, key): tuple(t.shape) for key, t in published_state_dict(net).items()})
    if sum(t.numel() for t in state.values()) < 1e8:
        assert fill_sha256(state) == str(networks()[f"{name}_filled_sha256"])
    ours = {key.replace("top_layer.0.", "top_layer."): tensor for key, tensor in state.items()}
    net.load_state_dict({"backbone." * (not k.startswith("top")) + k: t for k, t in ours.items()}, assign=True)
    return net.eval()


def close(got: Tensor, name: str) -> None:
    np.testing.assert_allclose(got.detach().numpy(), networks()[name], rtol=1e-9, atol=1e-9)


def every(tensor: Tensor, k: int) -> Tensor:
    return tensor.flatten(1)[:, ::k]


def relus(backbone: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """Outputs of the ReLUs of the convolutions, in order."""
    x = backbone.sobel(x)
    for layer in backbone.features:
        x = layer(x)
        if isinstance(layer, nn.ReLU):
            yield x


@torch.no_grad()
@pytest.mark.parametrize("name", ["dc_alexnet", "dc_vgg16"])
def test_deepcluster_outputs(name: str) -> None:
    net = golden_net(name)
    x = images(name.removeprefix("dc_"), 2, 3, 224, 224)
    features_NF, logits = net([x])
    close(every(features_NF, 64), f"{name}_features_every64")
    close(logits[0], f"{name}_eval_logits")
    edges = net.backbone.sobel(x)
    assert list(edges.shape) == networks()[f"{name}_sobel_shape"].tolist()
    close(every(edges, 503), f"{name}_sobel_every503")
    for k, y in enumerate(relus(net.backbone, x), start=1):
        if f"{name}_relu{k}_shape" in networks():
            assert list(y.shape) == networks()[f"{name}_relu{k}_shape"].tolist()
            close(every(y, 1009), f"{name}_relu{k}_every1009")


POOLING = {1: (6, 6, 3), 2: (4, 4, 0), 3: (3, 3, 1), 4: (3, 3, 1), 5: (2, 2, 0)}


@torch.no_grad()
def test_deepcluster_linear_classifiers_on_convolutions_and_colours() -> None:
    net = golden_net("dc_alexnet")
    for k, y in enumerate(relus(net.backbone, images("alexnet", 2, 3, 224, 224)), start=1):
        size, stride, padding = POOLING[k]
        pooled = F.avg_pool2d(y, size, stride, padding).flatten(1)
        layer = nn.Linear(pooled.shape[1], 6)
        state = filled({f"conv{k}.linear.{n}": tuple(p.shape) for n, p in layer.named_parameters()})
        weight, bias = state[f"conv{k}.linear.weight"], state[f"conv{k}.linear.bias"]
        close(F.linear(pooled, weight, bias), f"dc_alexnet_reglog_conv{k}_logits")
    close(golden_net("dc_alexnet_rgb")([images("alexnet", 2, 3, 224, 224)])[1][0], "dc_alexnet_rgb_eval_logits")


@torch.no_grad()
@pytest.mark.parametrize("name", ["sela_alexnet_big", "sela_alexnet_small"])
def test_sela_alexnet_outputs(name: str) -> None:
    net = golden_net(name)
    features_NF, logits = net([images("sela224", 2, 3, 224, 224)])
    close(every(F.relu(features_NF), 64), f"{name}_eval_features_every64")
    for head, logits_NK in enumerate(logits):
        close(logits_NK, f"{name}_eval_logits{head}")


@torch.no_grad()
@pytest.mark.parametrize("name", ["sela_resnetv2", "sela_resnetv2_1head", "sela_resnetv1"])
def test_sela_resnet_outputs(name: str) -> None:
    net = golden_net(name)
    size = int(networks()["sela_resnetv2_input_size"])
    x = images("sela224", 2, 3, 224, 224) if name == "sela_resnetv1" else images("sela", 2, 3, size, size)
    features_NF, logits = net([x])
    for head, logits_NK in enumerate(logits):
        close(logits_NK, f"{name}_eval_logits{head if len(logits) > 1 else ''}")
    if name == "sela_resnetv2":
        close(every(features_NF, 16), f"{name}_eval_features_every16")
        close(net.train()([x])[1][0], f"{name}_train_logits0")


@torch.no_grad()
def test_absorbed_batch_norm() -> None:
    trunk = golden_net("sela_alexnet_big").backbone
    absorbed = absorb_batchnorm(trunk.features)
    layers = networks()["sela_absorb_layers"].tolist()
    assert [type(layer).__name__ for layer in absorbed] == layers[:-1] and layers[-1] == "View"
    close(every(absorbed[0].weight, 17), "sela_absorb_conv1_weight_every17")
    close(absorbed[0].bias, "sela_absorb_conv1_bias")
    x = images("sela224", 2, 3, 224, 224)
    torch.testing.assert_close(absorbed(x), trunk.features(x), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_vit_outputs_at_both_sizes() -> None:
    with torch.device("meta"):
        vit = build_backbone("vit_tiny").double()
    state = filled({key: tuple(t.shape) for key, t in vit.state_dict().items()})
    assert fill_sha256(state) == str(networks()["sc_vit_tiny_filled_sha256"])
    vit.load_state_dict(state, assign=True)
    for size in (224, 96):
        close(vit(images(f"vit{size}", 1, 3, size, size)), f"sc_vit_tiny_eval_{size}")


PUBLISHED = {
    "deepcluster_alexnet": ("sobel:deepcluster_alexnet", (10000,)),
    "deepcluster_vgg16": ("sobel:deepcluster_vgg16", (10000,)),
    "selflabel_resnetv2_10x3k": ("sela_resnetv2", (3000,) * 10),
    "selflabel_alexnet_10x3k": ("sela_alexnet", (3000,) * 10),
    "selflabel_alexnet_1head": ("sela_alexnet", (1000,)),
    "selflabel_resnetv1_10x3k": ("sela_resnetv1", (3000,) * 10),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_equal_the_published_file(name: str) -> None:
    arch, sizes = PUBLISHED[name]
    with torch.device("meta"):
        net = build_headed(arch, "imagenet", sizes)
    table = published_names()[name]
    got = shapes_of(published_state_dict(net))
    assert got == {key.replace("features.module.", "features."): shape for key, shape in table.items()}
    shapes = {key: [int(n) for n in shape.split("x")] if shape else [] for key, shape in table.items()}
    load_published(net, {key: torch.empty(shape, device="meta") for key, shape in shapes.items()})


def test_names_of_a_small_vit() -> None:
    with torch.device("meta"):
        vit = build_backbone("vit_small")
    got = {f"backbone.{name}": shape for name, shape in shapes_of(vit.state_dict()).items()}
    assert list(got.items()) == list(published_names()["selfclassifier_vit_small_backbone"].items())


@pytest.mark.parametrize(
    "name", ["dc_alexnet", "dc_alexnet_rgb", "sela_alexnet_small", "sela_resnetv2", "sela_resnetv1"]
)
def test_initialisation_statistics(name: str) -> None:
    torch.manual_seed(5)
    arch, sizes = GOLDEN[name]
    check_init(flat_state_dict(build_headed(arch, "imagenet", sizes, head_std=0.0 if "resnet" in arch else 0.01)), name)


def test_initialisation_statistics_of_vit() -> None:
    torch.manual_seed(5)
    check_init(build_backbone("vit_tiny").state_dict(), "sc_vit_tiny")


def check_init(state: dict[str, Tensor], name: str) -> None:
    keys = networks()[f"{name}_init_keys"].tolist()
    assert set(keys) == {key for key in state if not key.endswith("num_batches_tracked")}
    for key, row in zip(keys, networks()[f"{name}_init_numel_mean_std_min_max"], strict=True):
        numel, mean, std, low, high = row
        x = state[key].flatten()
        assert x.numel() == numel, key
        if low == high:
            assert x.unique().tolist() == [pytest.approx(mean)], key
            continue
        assert abs(x.mean() - mean) < 6 * std * (2 / numel) ** 0.5, key
        assert abs(x.std() - std) < 6 * std * numel**-0.5, key


def test_golden_parameters_are_those_assumed_here() -> None:
    assert json.loads(str(networks()["dc_alexnet_params"])) == {"sobel": True, "out": 12}
    assert json.loads(str(networks()["sela_alexnet_small_params"])) == {"num_classes": [7, 7], "size": "small"}
    assert signed("x", (2, 3)).shape == (2, 3)
