"""SeLa's published flags, command lines and recipes in our vocabulary, and what is refused."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import main_sela
from clusterssl import config as cfg
from clusterssl import sela_flags
from tests.golden_files import FOLDER
from tests.launch import ROOT, TINY, metrics

PUBLISHED = json.loads((FOLDER / "published_sela.json").read_text())
RECIPES = {recipe["name"]: recipe for recipe in PUBLISHED["recipes"]}
SCRIPTS = {
    "sela_alexnet.sh": "alexnet", "sela_alexnet_cpu.sh": "alexnet-cpu", "sela_resnet.sh": "resnet",
    "sela_cifar.sh": "cifar", "sela_augpp_r18_1k.sh": "augpp_r18_1k", "sela_augpp_r50_1k.sh": "augpp_r50_1k",
    "sela_augpp_r50_10x3k.sh": "augpp_r50_10x3k", "selav2_400ep_pretrain.sh": "selav2_400ep",
    "selav2_400ep_2x224_pretrain.sh": "selav2_400ep_2x224",
}  # fmt: skip


def parsed(words: list[str]) -> Any:
    """The configuration that the script makes of a command line."""
    words = sela_flags.translate(words)
    if sela_flags.is_version_1(words):
        return cfg.parse(sela_flags.Config, words, default=sela_flags.defaults(words))
    return cfg.parse(main_sela.Config, words)


def without_places(config: Any) -> Any:
    """The configuration without paths and devices."""
    run = replace(config.run, dump_path=".", device="auto")
    return replace(config, data=replace(config.data, data_path="", workers=0), run=run)


def by_flag(config: Any) -> dict[str, Any]:
    return {flag.name: flag.default for flag in cfg.flags(config)}


@pytest.mark.parametrize("system", ["main", "cifar"])
def test_published_flags_are_known_with_their_defaults(system: str) -> None:
    """Every flag parses; what has a meaning here has the published default."""
    images = {"main": "imagenet_path", "cifar": "datadir"}[system]
    ours = by_flag(parsed([f"--{images}", "/images"]))
    renamed = {"lr": "base_lr", "exp": "dump_path", "log_iter": "log_freq"}
    elsewhere = {
        "wd": 1e-5,
        "epochs": 201,
        "archspec": None,
        "exp": ".",
        "log_iter": 10,
        "resume": None,
        "device": None,
    }
    for flag in PUBLISHED["flags"][system]:
        name = flag["dest"]
        if name in ("test_only", "restart"):
            continue
        for spelling in flag["flags"]:
            value = [] if flag["action"] == "store_true" else [str(flag["default"] or "1")]
            if name == "resume":
                value = ["x.pth"]
            assert parsed([f"--{images}", "/images", spelling, *value])
        place = renamed.get(name, name)
        expected = (
            elsewhere.get(name, flag["default"])
            if system == "main" or name not in ("wd", "epochs")
            else flag["default"]
        )
        if place in ours and expected is not None and name not in ("exp", "log_iter"):
            assert ours[place] == expected, name


def test_a_published_line_and_ours_are_the_same() -> None:
    theirs = (
        "--imagenet-path /i --exp runs/x --batch-size 64 --lr 0.1 --wd -4 --hc 3 --ncl 99 --epochs 7 --log-iter 5 "
        "--cpu --device 1 --archspec small"
    )
    ours = (
        "--version 1 --data_path /i --dump_path runs/x --batch_size 64 --base_lr 0.1 --wd 1e-4 --hc 3 --ncl 99 "
        "--epochs 8 --log_freq 5 --device cpu --arch alexnet_small"
    )
    assert parsed(theirs.split()) == parsed(ours.split())
    assert parsed(["--version", "1", "--data_path", "/i", "--epochs", "7"]).optim.epochs == 7
    assert parsed(["--version=1", "--data_path=/i", "--wd=-5"]).optim.wd == 1e-5
    assert parsed(["--data_path", "/i"]).version == "2"
    assert parsed(["--version", "1"]) == sela_flags.DIGITS
    assert parsed(["--version", "1", "--cifar", "false", "--data_path", "/i"]) == replace(
        sela_flags.Config(), data=replace(sela_flags.Config().data, data_path="/i")
    )


def test_settings_for_cifar() -> None:
    config = parsed(["--datadir", "/c", "--device", "3"])
    assert (config.sela.ncl, config.sela.hc, config.sela.lamb, config.transport.sinkhorn_tol) == (128, 20, 10.0, 0.01)
    assert config.augment().mean == (0.4914, 0.4822, 0.4465) and config.augment().std == (0.2023, 0.1994, 0.2010)
    assert sela_flags.Config().augment().std == (0.229, 0.224, 0.225)


def test_the_folder_train_is_found(tmp_path: Path) -> None:
    assert parsed(["--imagenet-path", str(tmp_path)]).data.data_path == str(tmp_path)
    (tmp_path / "train").mkdir()
    assert parsed(["--imagenet-path", str(tmp_path)]).data.data_path == str(tmp_path / "train")


def flags_of(script: Path) -> list[str]:
    text = script.read_text().replace("\\\n", " ")
    return [word for word in shlex.split(text.split("main_sela.py", 1)[-1]) if word != "$@"]


def test_every_recipe_has_its_script() -> None:
    assert set(SCRIPTS.values()) == set(RECIPES)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_recipe_script_gives_the_published_flags(name: str) -> None:
    script, recipe = ROOT / "scripts" / name, RECIPES[SCRIPTS[name]]
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/bin/bash" and any(line.startswith("#SBATCH") for line in lines)
    ours = parsed(flags_of(script))
    if recipe["flags"] is not None:
        theirs = [word.replace("$", "") for word in recipe["flags"] if name != "sela_resnet.sh" or word != "--cpu"]
        assert without_places(ours) == without_places(parsed(theirs))
        assert (ours.run.device == "cpu") == (name == "sela_alexnet_cpu.sh")
    for key in ("imagenet_linear_top1", "linear_probe_top1"):
        assert str(recipe.get("published", {}).get(key, "")) in script.read_text()


def start(words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["main_sela.py", *words, "--dump_path", str(folder)])
    with pytest.raises(SystemExit) as end:
        cfg.entry(main_sela.main)
    return int(end.value.code or 0)


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe["flags"]])
def test_a_published_command_line_starts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own words, then a smaller network and fewer images; --epochs 1 means two but for CIFAR."""
    words = [word.replace("$", "") for word in RECIPES[name]["flags"]]
    words = ["synthetic:16:24x24" if word.lower() == "{dir}" else word for word in words]
    words += ["--size_crops", "16", "--arch", "conv4w4", "--batch_size", "8"]
    words += ["--ncl", "4", "--epochs", "1", "--nopts", "3", "--workers", "0", "--device", "cpu"]
    assert start(words, tmp_path, monkeypatch) == 0, capsys.readouterr()
    assert max(record.get("step", 0) for record in metrics(tmp_path)) == (2 if name == "cifar" else 4)


SMALL = {
    "1": ["--version", "1", "--data_path", "synthetic:96:24x24", "--size_crops", "16", "--arch", "conv4w4"],
    "2": TINY,
}


@pytest.mark.parametrize(
    ("version", "words", "said"),
    [
        ("1", "--ncl 97", "--ncl 97: more clusters than the 96 images"),
        ("1", "--ncl 1", "--ncl 1: must be at least 2"),
        ("1", "--hc 0", "--hc 0: must be above 0"),
        ("1", "--augs 4", "--augs 4: must be at least 0 and at most 3"),
        ("1", "--nmb_crops 2", "--nmb_crops: SeLa sees one crop of an image"),
        ("1", "--lrdrop 0", "--lrdrop 0: must be at least 1"),
        ("1", "--nmb_prototypes 5", "--nmb_prototypes: unknown flag"),
        ("1", "--restart", "--restart: not here; another --exp starts again"),
        ("1", "--test-only", "--test_only: not here; eval_knn.py tests"),
        ("2", "--nmb_prototypes 12", "--crops_for_assign names 2 crops, --nmb_prototypes has layers for only 1"),
        ("2", "--nmb_prototypes 12 97", "--nmb_prototypes 97: there are only 96 images in an epoch to cluster"),
        ("2", "--crops_for_assign 0 3 --nmb_prototypes 5 5", "--crops_for_assign 0 3: there are 3 crops"),
        ("2", "--nmb_prototypes 12 1", "--nmb_prototypes 12 1: must be at least 2"),
        ("2", "--nmb_prototypes 9 9 --epsilon 0", "--epsilon 0.0: must be above 0"),
        ("2", "--nmb_prototypes 9 9 --sinkhorn_tol -1", "--sinkhorn_tol -1.0: must be above 0"),
        ("2", "--hc 3", "--hc: unknown flag"),
        ("2", "--version 3", "is none of 2, 1"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    version: str,
    words: str,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "run"
    assert start([*SMALL[version], "--batch_size", "16", *words.split()], folder, monkeypatch) == 2
    line = capsys.readouterr().err.strip()
    assert said in line and "\n" not in line and not folder.exists(), line
