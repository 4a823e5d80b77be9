"""Which network and which data an evaluation takes, and what it writes down."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clusterssl.errors import UserError
from clusterssl.evals.inputs import (
    DataOptions,
    NetworkOptions,
    append_evaluation,
    fingerprint,
    open_network,
    open_splits,
)
from clusterssl.models.build import build_model
from clusterssl.models.weights import published_state_dict


def checkpoint(path: Path, arch: str = "conv4w4", stem: str = "small", *, record: bool = True) -> Path:
    torch.manual_seed(3)
    model = build_model(arch, stem, 8, 4, 5)
    state: dict[str, Any] = {"state_dict": published_state_dict(model)}
    if record:
        state["model"] = {"arch": arch, "stem": stem, "size_crops": [[16, 24], [12, 12]]}
    torch.save(state, path)
    return path


def opened(options: NetworkOptions, *argv: str, data_path: str = "digits") -> Any:
    return open_network(options, data_path=data_path, seed=1, argv=argv)


def test_own_checkpoint_names_its_network(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = checkpoint(tmp_path / "own.pth.tar")
    with caplog.at_level(logging.INFO, "clusterssl"):
        network = opened(NetworkOptions(pretrained=str(path)))
    assert (network.arch, network.stem, network.image_size) == ("conv4w4", "small", (16, 24))
    assert f"--arch conv4w4: taken from {path}" in caplog.text
    weights = torch.load(path, weights_only=True)["state_dict"]
    assert torch.equal(network.backbone.conv1.weight, weights["module.conv1.weight"])
    assert not any(p.requires_grad for p in network.backbone.parameters())
    assert opened(NetworkOptions(pretrained=str(path), image_size=20)).image_size == (20, 20)


def test_published_file_shows_its_network(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "w.pth", "resnet18", "imagenet", record=False)
    network = opened(NetworkOptions(pretrained=str(path)), data_path="/photos")
    assert (network.arch, network.stem, network.image_size) == ("resnet18", "imagenet", (224, 224))


def test_flags_that_contradict_the_checkpoint(tmp_path: Path) -> None:
    own = str(checkpoint(tmp_path / "own.pth.tar", "resnet18", "small"))
    with pytest.raises(UserError, match=r"--arch resnet50: .* was trained with arch resnet18"):
        opened(NetworkOptions(pretrained=own), "--arch", "resnet50")
    with pytest.raises(UserError, match=r"--stem imagenet: .* was trained with stem small"):
        opened(NetworkOptions(pretrained=own, stem="imagenet"), "--stem=imagenet")
    assert opened(NetworkOptions(pretrained=own, arch="resnet18"), "--arch", "resnet18").arch == "resnet18"
    other = str(checkpoint(tmp_path / "other.pth", "resnet18", "small", record=False))
    with pytest.raises(UserError, match="does not fit this network"):
        opened(NetworkOptions(pretrained=other, arch="resnet34"), "--arch", "resnet34")


def test_without_weights_the_network_is_untrained_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    options = NetworkOptions(arch="conv4w4")
    with caplog.at_level(logging.WARNING, "clusterssl"):
        networks = [opened(options, "--arch", "conv4w4") for _ in range(2)]
    assert "untrained" in caplog.text
    assert networks[0].fingerprint == networks[1].fingerprint
    assert networks[0].image_size == (32, 32)
    other = open_network(options, data_path="digits", seed=2, argv=())
    assert other.fingerprint != networks[0].fingerprint


def test_fingerprint_sees_every_weight_and_statistic() -> None:
    layer = torch.nn.BatchNorm2d(3)
    before = fingerprint(layer)
    layer.running_mean[1] = 1e-6
    assert fingerprint(layer) != before


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)


def test_both_splits_need_the_same_classes(tmp_path: Path) -> None:
    for name in ("ant", "bee", "cat"):
        picture(tmp_path / "train" / name / "0.png")
        picture(tmp_path / "val" / name / "1.png")
    train, val = open_splits(DataOptions(data_path=str(tmp_path)))
    assert train.labels.tolist() == val.labels.tolist() == [0, 1, 2]
    assert train.classes == val.classes == ["ant", "bee", "cat"]
    picture(tmp_path / "val" / "dog" / "0.png")
    with pytest.raises(UserError, match=r"1 of 4 classes of val are not in train \(first: dog\)"):
        open_splits(DataOptions(data_path=str(tmp_path)))
    (tmp_path / "val" / "dog").rename(tmp_path / "train" / "dog")
    (tmp_path / "train" / "eel").mkdir()
    with pytest.raises(UserError, match=r"1 of 4 classes of train are not in val \(first: dog\)"):
        open_splits(DataOptions(data_path=str(tmp_path)))


def test_a_wrong_layout_is_described(tmp_path: Path) -> None:
    for name in ("n1", "n2", "test/n1"):
        picture(tmp_path / name / "0.png")
    (tmp_path / "labels.txt").touch()
    with pytest.raises(
        UserError, match=r"expected train/ and val/, .* found 3 folders \(n1/, n2/, test/\) and 1 files"
    ):
        open_splits(DataOptions(data_path=str(tmp_path)))
    with pytest.raises(UserError, match=r"expected train/ and test/.*found no folders and 1 files"):
        open_splits(DataOptions(data_path=str(tmp_path / "n1"), val_split="test"))


def test_data_that_cannot_be_evaluated(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--data_path: name the folder"):
        open_splits(DataOptions())
    with pytest.raises(UserError, match="does not exist"):
        open_splits(DataOptions(data_path=str(tmp_path / "nowhere")))
    picture(tmp_path / "train" / "ant" / "0.png")
    with pytest.raises(UserError, match="val"):
        open_splits(DataOptions(data_path=str(tmp_path)))
    picture(tmp_path / "val" / "0.png")
    with pytest.raises(UserError, match="val has no labels"):
        open_splits(DataOptions(data_path=str(tmp_path)))


def test_digits_splits() -> None:
    train, val = open_splits(DataOptions(data_path="digits"))
    _, test = open_splits(DataOptions(data_path="digits", val_split="test"))
    assert [len(source) for source in (train, val, test)] == [1000, 300, 497]


def test_workers_are_no_more_than_the_cores() -> None:
    assert DataOptions(data_path="digits").usable_workers == 0
    assert DataOptions(data_path="/photos", workers=10**6).usable_workers <= 10**4


def test_records_are_appended_once_each_also_after_a_torn_line(tmp_path: Path) -> None:
    network = opened(NetworkOptions(arch="conv4w4"), "--arch", "conv4w4")

    def append(top1: float) -> None:
        append_evaluation(tmp_path / "run", "knn", {"k": 20, "top1": top1}, network, NetworkOptions(), DataOptions())

    append(50.0)
    append(50.0)
    path = tmp_path / "run" / "evaluations.jsonl"
    with path.open("a") as file:
        file.write('{"eval": "kn')
    append(51.0)
    lines = path.read_text().splitlines()
    assert [json.loads(lines[i])["top1"] for i in (0, 2)] == [50.0, 51.0]
    assert len(lines) == 3
    record = json.loads(lines[0])
    assert record["eval"] == "knn" and record["k"] == 20 and record["pretrained"] == "" and record["arch"] == "conv4w4"


@pytest.mark.parametrize(("head", "red"), [("projection_head.0.weight", 0.228), ("top_layer.weight", 0.229)])
def test_pixels_are_scaled_as_in_the_networks_training(tmp_path: Path, head: str, red: float) -> None:
    state = {**build_model("conv4w4", "small", 0, 0, 0).backbone.state_dict(), head: torch.zeros(3, 32)}
    torch.save(state, tmp_path / "weights.pth")
    options = NetworkOptions(pretrained=str(tmp_path / "weights.pth"), image_size=24)
    assert open_network(options, data_path="", seed=0, argv=[]).std == (red, 0.224, 0.225)
