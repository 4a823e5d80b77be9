"""Networks of all classes rebuilt from files: own checkpoints and published ones; starting one network from another."""

from __future__ import annotations

import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from clusterssl.errors import UserError
from clusterssl.models.build import build_model
from clusterssl.models.headed import HeadedNet, build_headed
from clusterssl.models.identify import describe
from clusterssl.models.network import Network
from clusterssl.models.reading import flat_name, read_labels
from clusterssl.models.selfclassifier import SelfClassifierNet, build_selfclassifier
from clusterssl.models.weights import (
    backbone_from_weights,
    flat_state_dict,
    init_model,
    model_from_weights,
    published_state_dict,
)
from tests.models.golden import published_names

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


def table(name: str) -> dict[str, Tensor]:
    """State dict of a published file, its names (with "module." where it has it) and shapes, in hardly any memory."""
    prefix = "module." if name.startswith("selfclassifier") else ""
    shapes = {
        key: [int(n) for n in shape.split("x")] if shape else [] for key, shape in published_names()[name].items()
    }
    state = {}
    for i, (key, shape) in enumerate(shapes.items()):
        dtype = torch.int64 if key.endswith("num_batches_tracked") else torch.float32
        state[prefix + key] = torch.tensor(i % 7 + 1, dtype=dtype).expand(shape)
    return state


class NNQueue:
    """An object such as Self-Classifier pickles into its checkpoints."""

    def __init__(self) -> None:
        self.queue_len, self.dim, self.ptr, self.full = 8, 4, 3, False
        self.queue = torch.zeros(8, 4)
        self.queue_targets, self.queue_indices = torch.zeros(8), torch.zeros(8, dtype=torch.int64)


NNQueue.__module__ = "utils"


def deepcluster(name: str) -> dict[str, Any]:
    """Contents of a DeepCluster file, which PyTorch 0.1 wrote: no batch counters."""
    state = {key: tensor for key, tensor in table(name).items() if not key.endswith("num_batches_tracked")}
    return {"epoch": 500, "arch": name.rpartition("_")[2], "state_dict": state, "optimizer": {"state": {}}}


FILES: dict[str, tuple[Any, str, tuple[int, ...]]] = {
    "DeepCluster AlexNet": (lambda: deepcluster("deepcluster_alexnet"), "sobel:deepcluster_alexnet", (10000,)),
    "DeepCluster VGG-16": (lambda: deepcluster("deepcluster_vgg16"), "sobel:deepcluster_vgg16", (10000,)),
    "SeLa ResNet": (lambda: table("selflabel_resnetv2_10x3k"), "sela_resnetv2", (3000,) * 10),
    "SeLa AlexNet": (lambda: table("selflabel_alexnet_10x3k"), "sela_alexnet", (3000,) * 10),
    "SeLa AlexNet, rotations": (
        lambda: (
            table("selflabel_alexnet_10x3k")
            | {"top_layer10.weight": torch.zeros(4, 4096), "top_layer10.bias": torch.zeros(4)}
        ),
        "sela_alexnet",
        (*(3000,) * 10, 4),
    ),
    "SeLa training file": (
        lambda: {"epoch": 3, "arch": "alexnet", "state_dict": table("selflabel_alexnet_1head"), "L": torch.arange(5)},
        "sela_alexnet",
        (1000,),
    ),
    "SeLa in torchvision's names": (
        lambda: {"state_dict": table("selflabel_resnet50-10x3k_pp"), "labels": torch.zeros(10, 4, dtype=torch.int64)},
        "resnet50",
        (3000,),
    ),
    "SeLa ResNet-18": (
        lambda: {"state_dict": table("selflabel_resnet18-1k_pp"), "labels": torch.arange(4)[None]},
        "resnet18",
        (1000,),
    ),
    "Self-Classifier": (
        lambda: {"epoch": 8, "state_dict": table("selfclassifier_resnet50"), "nn_queue": NNQueue(), "best_loss": 1.5},
        "resnet50",
        (1000, 2000, 4000, 8000),
    ),
}


@pytest.fixture
def utils(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module `utils` with the queue's class, for writing files; reading must do without."""
    module = types.ModuleType("utils")
    module.NNQueue = NNQueue
    monkeypatch.setitem(sys.modules, "utils", module)


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("zipped", [True, False])
def test_published_files_give_their_networks(
    kind: str, zipped: bool, tmp_path: Path, utils: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, arch, sizes = FILES[kind]
    contents = make()
    torch.save(contents, tmp_path / "published.pth", _use_new_zipfile_serialization=zipped)
    monkeypatch.delitem(sys.modules, "utils")
    net = model_from_weights(str(tmp_path / "published.pth"))
    assert net.backbone.arch_name == arch and net.backbone.stem_name == "imagenet"
    assert (net.cls_size if isinstance(net, SelfClassifierNet) else net.nmb_clusters) == sizes
    assert not isinstance(net, HeadedNet) or net.relu_before_heads == ("alexnet" in arch or "vgg" in arch)
    state = flat_state_dict(net)
    for name, tensor in contents.get("state_dict", contents).items():
        ours = flat_name(name)
        assert torch.equal(state[ours if ours in state else ours.replace("fc.", "top_layer.")], tensor), name


def test_labels_beside_the_weights(tmp_path: Path) -> None:
    weights = {"fc.weight": torch.zeros(2, 2)}
    for key, labels in (("labels", torch.arange(6).reshape(2, 3)), ("L", torch.arange(3, dtype=torch.int32))):
        torch.save({"state_dict": weights, key: labels}, tmp_path / "sela.pth")
        read = read_labels(str(tmp_path / "sela.pth"))
        assert read.dtype == torch.int64 and torch.equal(read, labels.long().reshape(-1, 3))
    for content in ({"state_dict": weights}, {"labels": torch.rand(3)}, {"labels": "no"}):
        torch.save(content, tmp_path / "none.pth")
        with pytest.raises(UserError, match=r"none\.pth: holds no labels"):
            read_labels(str(tmp_path / "none.pth"))


class _Python2Pickler(pickle._Pickler):
    """Writes text as Python 2 did, as byte strings."""

    dispatch: ClassVar[dict[Any, Any]] = dict(pickle._Pickler.dispatch)

    def save_bytes_string(self, text: str) -> None:
        raw = text.encode("ascii")
        self.write(pickle.SHORT_BINSTRING + bytes([len(raw)]) + raw)
        self.memoize(text)

    dispatch[str] = save_bytes_string


def test_file_written_under_python_2(tmp_path: Path) -> None:
    python2 = types.SimpleNamespace(
        __name__="pickle",
        Pickler=_Python2Pickler,
        dump=lambda obj, file, protocol: _Python2Pickler(file, protocol).dump(obj),
    )
    net = build_headed("resnet18", "small", (5,))
    contents = {"epoch": 2, "arch": "alexnet", "state_dict": OrderedDict(published_state_dict(net))}
    path = tmp_path / "old.pth.tar"
    torch.save(contents, path, pickle_module=python2, _use_new_zipfile_serialization=False)
    assert b"U\x05epoch" in path.read_bytes()
    assert same(flat_state_dict(model_from_weights(str(path))), flat_state_dict(net))


def test_the_stand_in_of_the_queue_lets_no_other_object_in(tmp_path: Path, utils: None) -> None:
    class Hostile(NNQueue):
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    allowed = set(torch.serialization.get_safe_globals())
    torch.save({"state_dict": {"a": torch.zeros(1)}, "nn_queue": Hostile()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="refused"):
        model_from_weights(str(tmp_path / "evil.pth"))
    assert not (tmp_path / "ran").exists()
    assert set(torch.serialization.get_safe_globals()) == allowed
