"""Networks of all classes rebuilt from files: own checkpoints and published ones; starting one network from another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clusterssl.models.build import build_model
from clusterssl.models.headed import build_headed
from clusterssl.models.identify import describe
from clusterssl.models.network import Network
from clusterssl.models.selfclassifier import build_selfclassifier
from clusterssl.models.weights import (
    backbone_from_weights,
    flat_state_dict,
    init_model,
    model_from_weights,
    published_state_dict,
)

NETWORKS: dict[str, Any] = {
    "multicrop": lambda: build_model("conv4w8", "small", 12, 6, 5),
    "several prototype layers": lambda: build_model("conv4w8", "small", 12, 6, (5, 4), False),
    "not normalised": lambda: build_model("conv4w8", "small", 0, 6, 5, normalize=False),
    "one head": lambda: build_headed("conv4w8", "small", (5,), True, 0.01),
    "heads": lambda: build_headed("resnet18", "small", (5, 7, 3)),
    "selfclassifier": lambda: build_selfclassifier("conv4w8", "small", (5, 7), 2, 12, 6),
    "long head": lambda: build_selfclassifier("conv4w8", "small", (5,), 5, 12, 6, False, True),
    "short head": lambda: build_selfclassifier("conv4w8", "small", (5,), 1, 6, 6, fixed_cls=True),
    "no head": lambda: build_selfclassifier("conv4w8", "small", (5,), 0),
}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def saved(net: Network, path: Path, **record: Any) -> str:
    torch.save({"epoch": 1, "state_dict": published_state_dict(net), **record}, path)
    return str(path)


@pytest.mark.parametrize("kind", NETWORKS)
def test_own_checkpoint_gives_the_same_network(kind: str, tmp_path: Path) -> None:
    net = NETWORKS[kind]().eval()
    path = saved(net, tmp_path / "own.pth", model={"size_crops": [[32, 32]], **net.record()})
    again = model_from_weights(path).eval()
    assert type(again) is type(net) and again.record() == net.record()
    assert same(published_state_dict(again), published_state_dict(net))
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in net.parameters()]
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(again.scores([images]), net.scores([images]), strict=True))
    assert torch.equal(again.predict(images), net.predict(images))
    assert same(backbone_from_weights(path).state_dict(), net.backbone.state_dict())


@pytest.mark.parametrize("kind", ["multicrop", "several prototype layers", "heads", "selfclassifier"])
def test_names_and_shapes_alone_tell_the_network(kind: str, tmp_path: Path) -> None:
    net = NETWORKS[kind]()
    again = model_from_weights(saved(net, tmp_path / "bare.pth"))
    assert again.record() == net.record() and same(flat_state_dict(again), flat_state_dict(net))


def test_heads_have_the_sizes_of_the_tensors_whatever_the_record_says(tmp_path: Path) -> None:
    net = build_headed("conv4w8", "small", (5,))
    record = net.record()
    net.set_heads([9])
    again = model_from_weights(saved(net, tmp_path / "own.pth", model=record))
    assert again.nmb_clusters == (9,)


def test_a_torchvision_network_without_head_is_still_known() -> None:
    look = describe(build_headed("resnet18", "small", ()).backbone.state_dict())
    assert look is not None and (look.arch, look.stem, look.net) == ("resnet18", "small", "multicrop")


@pytest.mark.parametrize("source", ["multicrop", "one head", "selfclassifier"])
@pytest.mark.parametrize("target", ["multicrop", "one head", "selfclassifier"])
def test_any_network_starts_from_any_other(source: str, target: str, tmp_path: Path) -> None:
    giver, taker = NETWORKS[source](), NETWORKS[target]()
    before = {name: tensor.clone() for name, tensor in flat_state_dict(taker).items()}
    left = init_model(taker, saved(giver, tmp_path / "w.pth"))
    parts = {"multicrop": ["projection_head", "prototypes"], "one head": ["top_layer"]}
    parts["selfclassifier"] = ["mlp_head", "cls_0", "cls_1"]
    assert left == ([] if source == target else parts[target])
    state = flat_state_dict(taker)
    for name, tensor in flat_state_dict(giver).items():
        if name in state:
            assert torch.equal(state[name], tensor), name
    assert all(torch.equal(state[name], before[name]) for name in state if name.split(".")[0] in left)


def test_init_takes_the_classifiers_that_fit(tmp_path: Path) -> None:
    giver = build_selfclassifier("conv4w8", "small", (5, 7), 2, 12, 6)
    taker = build_selfclassifier("conv4w8", "small", (5, 8, 3), 2, 12, 6)
    assert init_model(taker, saved(giver, tmp_path / "w.pth")) == ["cls_1", "cls_2"]
    assert torch.equal(taker.cls_0.weight_v, giver.cls_0.weight_v)
    heads = build_headed("conv4w8", "small", (5, 7))
    taken = build_headed("conv4w8", "small", (5, 8))
    assert init_model(taken, saved(heads, tmp_path / "h.pth")) == ["top_layer1"]
    assert torch.equal(taken.top_layer0.bias, heads.top_layer0.bias) and taken.nmb_clusters == (5, 8)
