"""Every published format is recognised by its content and said in words; other projects' files are read too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor

from clusterssl.errors import UserError
from clusterssl.models.build import build_backbone, build_model
from clusterssl.models.contents import contents
from clusterssl.models.exported import detectron2_names
from clusterssl.models.headed import HeadedNet, build_headed
from clusterssl.models.weights import backbone_from_weights, load_backbone, model_from_weights, published_state_dict
from tests.models.golden import published_names

SWAV = "SwAV's family"
FORMATS: dict[str, tuple[str, str, str]] = {
    "swav_resnet50": (SWAV, "resnet50, imagenet stem, 23,508,032", "3000"),
    "swav_resnet50w2": (SWAV, "resnet50w2, imagenet stem", "3000"),
    "swav_resnet50w4": (SWAV, "resnet50w4, imagenet stem", "3000"),
    "swav_resnet50w5": (SWAV, "resnet50w5, imagenet stem", "3000"),
    "deepclusterv2_resnet50": (f"{SWAV}, several sets", "resnet50,", "3000, 3000, 3000"),
    "swav_eval_semisup": (f"{SWAV}, fine-tuned", "resnet50,", ""),
    "deepcluster_alexnet": ("DeepCluster", "sobel:deepcluster_alexnet,", "10000"),
    "deepcluster_vgg16": ("DeepCluster", "sobel:deepcluster_vgg16,", "10000"),
    "selflabel_resnetv2_10x3k": ("SeLa", "sela_resnetv2,", "3000, 3000"),
    "selflabel_resnetv1_10x3k": ("SeLa", "sela_resnetv1,", "3000, 3000"),
    "selflabel_alexnet_10x3k": ("SeLa", "sela_alexnet,", "3000, 3000"),
    "selflabel_alexnet_1head": ("SeLa", "sela_alexnet,", "1000"),
    "selflabel_resnet18-1k_pp": ("a network with a classifier", "resnet18,", "1000"),
    "selflabel_resnet50-10x3k_pp": ("a network with a classifier", "resnet50,", "3000"),
    "selfclassifier_resnet50": ("Self-Classifier", "resnet50,", "1000, 2000, 4000, 8000"),
    "selfclassifier_vit_small_backbone": ("a backbone without head", "vit_small,", ""),
}


def published(name: str) -> dict[str, Tensor]:
    """Names and shapes of a published file, in hardly any memory."""
    return {
        f"module.{key}": torch.tensor(1.0).expand([int(n) for n in shape.split("x")] if shape else [])
        for key, shape in published_names()[name].items()
    }


@pytest.mark.parametrize("name", FORMATS)
def test_every_published_format_is_told(name: str, tmp_path: Path) -> None:
    what, network, clusters = FORMATS[name]
    torch.save({"epoch": 7, "state_dict": published(name), "optimizer": {}}, tmp_path / "file.pth")
    told = contents(str(tmp_path / "file.pth"))
    assert told["what"].startswith(what) and told["network"].startswith(network), told
    assert told.get("clusters", "").startswith(clusters) and bool(clusters) == ("clusters" in told)
    assert told["beside it"] == "epoch 7, optimizer"


def test_the_formats_are_all_of_the_table() -> None:
    parts = {"selflabel_resnetv2_1head", "selfclassifier_head_3_layers", "selfclassifier_head_2_layers_nobn"}
    assert set(published_names()) - parts - {"selflabel_resnet50-1k_pp"} == set(FORMATS)


def foreign(prefix: str, heads: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A ResNet-18's own tensors, and those as a file of another project holds them."""
    own = {name: t for name, t in torchvision.models.resnet18().state_dict().items() if not name.startswith("fc.")}
    return own, {prefix + name: tensor for name, tensor in own.items()} | heads


ROW = torch.zeros(4, 512)
OTHERS: dict[str, tuple[str, str, dict[str, Tensor], str]] = {
    "MoCo": (
        "module.encoder_q.",
        "state_dict",
        {"module.encoder_q.fc.0.weight": ROW, "module.encoder_k.conv1.weight": torch.ones(64, 3, 7, 7),
         "module.queue": ROW, "module.queue_ptr": torch.zeros(1)},
        "MoCo",
    ),
    "SimSiam": (
        "module.encoder.",
        "state_dict",
        {"module.encoder.fc.0.weight": ROW, "module.predictor.0.weight": ROW},
        "SimSiam",
    ),
    "OBoW": ("", "network", {"fc.weight": ROW, "fc.bias": torch.zeros(4)}, "a network with a classifier"),
    "DINO": ("", "", {}, "a backbone without head"),
    "Barlow Twins": ("", "", {}, "a backbone without head"),
    "SCAN": ("backbone.", "model", {"cluster_head.0.weight": ROW, "cluster_head.0.bias": torch.zeros(4)}, "SCAN"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_projects_backbones_are_read_strictly(name: str, tmp_path: Path) -> None:
    prefix, wrapper, heads, what = OTHERS[name]
    own, state = foreign(prefix, heads)
    torch.save({"epoch": 3, wrapper: state} if wrapper else state, tmp_path / "file.pth")
    told = contents(str(tmp_path / "file.pth"))
    assert told["what"].startswith(what) and told["network"].startswith("resnet18, imagenet stem")
    for backbone in (build_backbone("resnet18"), backbone_from_weights(str(tmp_path / "file.pth"))):
        load_backbone(backbone, str(tmp_path / "file.pth"))
        for key, tensor in own.items():
            assert torch.equal(backbone.state_dict()[key], tensor), key
    del state[f"{prefix}layer2.0.conv1.weight"]
    torch.save({wrapper: state} if wrapper else state, tmp_path / "short.pth")
    with pytest.raises(UserError, match=r"1 missing: layer2\.0\.conv1\.weight"):
        load_backbone(build_backbone("resnet18"), str(tmp_path / "short.pth"))


def test_cluster_heads_of_scan_predict(tmp_path: Path) -> None:
    _, state = foreign("backbone.", {})
    weight = torch.randn(6, 512)
    state |= {"cluster_head.0.weight": weight, "cluster_head.0.bias": torch.zeros(6)}
    torch.save({"model": state, "head": 0}, tmp_path / "scan.pth")
    network = model_from_weights(str(tmp_path / "scan.pth"))
    assert isinstance(network, HeadedNet) and torch.equal(network.top_layer.weight, weight)


def test_a_classifier_alone_is_named(tmp_path: Path) -> None:
    state = {"module.linear.weight": torch.zeros(9, 512), "module.linear.bias": torch.zeros(9)}
    torch.save({"epoch": 100, "state_dict": state, "best_acc": 75.3}, tmp_path / "linear.pth")
    message = r"linear classifier of an evaluation \(512 features to 9 classes\), without the network"
    for read in (backbone_from_weights, lambda path: load_backbone(build_backbone("resnet18"), path)):
        with pytest.raises(UserError, match=message):
            read(str(tmp_path / "linear.pth"))
    told = contents(str(tmp_path / "linear.pth"))
    assert told["what"] == "a linear classifier" and "512 features to 9 classes" in told["network"]


def test_detectron2_names_are_named(tmp_path: Path) -> None:
    names = detectron2_names({n: t for n, t in torchvision.models.resnet18().state_dict().items() if n[:3] != "fc."})
    torch.save({"model": names, "matching_heuristics": True}, tmp_path / "detectron2.pth")
    with pytest.raises(UserError, match=r"has detectron2's names; give the checkpoint"):
        load_backbone(build_backbone("resnet18"), str(tmp_path / "detectron2.pth"))
    assert contents(str(tmp_path / "detectron2.pth"))["what"] == "weights of another network"


def test_clusters_on_features_are_deepclusters_or_selas(tmp_path: Path) -> None:
    network = build_headed("conv4w4", "small", (7, 9))
    torch.save({"state_dict": published_state_dict(network)}, tmp_path / "run.pth")
    told = contents(str(tmp_path / "run.pth"))
    assert told["what"] == "DeepCluster or SeLa" and told["clusters"] == "7, 9"


def test_an_archive_is_to_be_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "pretrained.zip", "w") as archive:
        archive.writestr("resnet-10x3k.pth", b"weights")
        archive.writestr("alexnet.pth", b"weights")
    with pytest.raises(UserError, match=r"an archive of resnet-10x3k\.pth, alexnet\.pth; unpack it") as error:
        contents(str(tmp_path / "pretrained.zip"))
    assert "\n" not in str(error.value)


def test_the_command(tmp_path: Path) -> None:
    network = build_model("conv4w4", "small", 8, 4, 5)
    record = {**network.record(), "size_crops": [[32, 32], [16, 16]]}
    own = {"epoch": 2, "step": 9, "state_dict": published_state_dict(network), "model": record, "method_state": {}}
    torch.save(own, tmp_path / "checkpoint.pth.tar")
    (tmp_path / "text.pth").write_text(json.dumps({"no": "weights"}))
    source = Path(__file__).resolve().parents[2] / "src"
    command = [sys.executable, "-m", "clusterssl.models.weights"]
    words = [str(tmp_path / "text.pth"), str(tmp_path / "checkpoint.pth.tar")]
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *words], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "text.pth: a text file" in done.stderr
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert lines[0] == words[1] and "what        SwAV's family, written by this suite" in lines
    assert any(line.startswith("network     conv4w4, small stem") for line in lines)
    assert {"clusters    5", "projection  8 to 4 numbers", "trained on  crops of 32x32, 16x16 pixels"} <= set(lines)
