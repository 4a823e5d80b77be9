"""The published command lines and launch scripts of Self-Classifier mean here what they meant there."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import main_selfclassifier
from clusterssl import config as cfg
from clusterssl.config import Size
from clusterssl.data.params import Param
from clusterssl.errors import UserError
from clusterssl.from_flags import warmup_and_cosine
from clusterssl.selfclassifier_flags import AUGMENT, translate
from main_selfclassifier import Config
from tests.golden_files import FOLDER, Golden
from tests.launch import ROOT

PUBLISHED = json.loads((FOLDER / "published_selfclassifier.json").read_text())
RECIPES = PUBLISHED["recipes"]
MAIN = [recipe for recipe in RECIPES if "/" not in recipe["name"]]
NAMED = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe["name"])


def parsed(words: list[str], ranks_per_node: int = 1) -> Config:
    env = {"RANK": "0", "WORLD_SIZE": str(ranks_per_node), "LOCAL_WORLD_SIZE": str(ranks_per_node)}
    return cfg.parse(Config, translate(words, Config(), env))


def values_of(words: list[str]) -> dict[str, Any]:
    """What the published parser makes of a command line: every flag by its destination."""
    found = {flag["dest"]: flag["default"] for flag in PUBLISHED["flags"]}
    by_name = {name: flag for flag in PUBLISHED["flags"] for name in flag["flags"]}
    words = list(words)
    while words:
        word = words.pop(0)
        flag = by_name.get(word)
        if flag is None:
            found["data"] = word
        elif flag["action"] == "store_true":
            found[flag["dest"]] = True
        elif flag["nargs"] == "+":
            found[flag["dest"]] = [float(words.pop(0)) for _ in words[: next(
                (i for i, w in enumerate(words) if w.startswith("-")), len(words))]]  # fmt: skip
        else:
            found[flag["dest"]] = words.pop(0)
    return found


def numbers(value: dict[str, Any], *names: str) -> list[float | None]:
    return [None if value[name] is None else float(value[name]) for name in names]


@NAMED
def test_every_published_command_line_means_what_it_meant(recipe: dict) -> None:
    then, ours = values_of(recipe["flags"]), parsed(recipe["flags"], recipe["tasks_per_node"])
    data, model, goal, optim, run = ours.data, ours.model, ours.objective, ours.optim, ours.run
    assert data.data_path == then["data"] and run.dump_path == then["save_path"] and run.dist_url == then["dist_url"]
    assert optim.batch_size == recipe["per_gpu_batch"] and optim.accumulate == 1
    assert (optim.optimizer, optim.schedule, model.use_fp16) == ("lars", "cosine", then["use_amp"])
    final = then["lr"] if then["final_lr"] is None else then["final_lr"]
    assert [optim.epochs, optim.warmup_epochs, optim.base_lr, optim.start_warmup, optim.wd, optim.momentum] == numbers(
        then, "epochs", "warmup_epochs", "lr", "start_warmup", "weight_decay", "momentum"
    )
    assert (optim.final_lr, optim.clip_grad, optim.bbone_wd, optim.no_bias_wd) == (float(final), 0, None, False)
    assert [model.hidden_mlp, model.feat_dim, model.num_hidden] == numbers(then, "hidden_dim", "dim", "num_hidden")
    assert (model.use_bn, model.fixed_cls, model.no_leaky) == (then["use_bn"], then["fixed_cls"], then["no_leaky"])
    assert list(model.cls_size) == then["cls_size"] and len(model.cls_size) == int(then["num_cls"])
    assert model.arch == "resnet50" and data.workers == int(then["workers"]) and run.log_freq == 16
    groups = int(then["syncbn_process_group_size"])
    assert (model.sync_bn, model.syncbn_process_group_size if groups else 0) == (
        ("apex" if groups else "pytorch"), groups)  # fmt: skip
    assert [goal.row_tau, goal.col_tau, goal.eps, goal.queue_len] == numbers(
        then, "row_tau", "col_tau", "eps", "queue_len"
    )
    assert goal.no_nn_aug == then["no_nn_aug"]
    views = [(2, Size(224, 224), *then["global_crops_scale"])]
    if int(then["local_crops_number"]):
        views.append((int(then["local_crops_number"]), Size(96, 96), *then["local_crops_scale"]))
    lists = (data.nmb_crops, data.size_crops, data.min_scale_crops, data.max_scale_crops)
    assert list(zip(*lists, strict=True)) == views


def test_every_published_flag_is_understood() -> None:
    values = {"patch_size": "16", "data": "", "arch": "vit_small", "num_cls": "2", "resume": ""}
    for flag in PUBLISHED["flags"]:
        for name in flag["flags"]:
            value = values.get(flag["dest"], "0.5" if "scale" in name or name in ("--lr", "--momentum") else "2")
            words = [] if flag["action"] == "store_true" else [value, *(["0.5"] if "scale" in name else [])]
            if name in ("data", "--rm-pretrained-cls"):
                continue
            more = ["--cls-size", "5", "6"] if flag["dest"] == "num_cls" else []
            more = ["--sgd"] if name == "--lars" else more
            assert isinstance(parsed(["/images", *more, name, *words]), Config), name
            assert isinstance(parsed([*more, name, *words, "/images"]), Config), name


def test_a_line_in_the_published_form_has_the_published_defaults() -> None:
    ours = parsed(["/images"], 4)
    assert (ours.optim.optimizer, ours.optim.schedule, ours.optim.epochs) == ("adamw", "constant", 800)
    assert ours.optim.batch_size == 64
    assert (ours.model.num_hidden, ours.model.use_bn, ours.model.cls_size) == (3, False, (1000,))
    assert ours.optim.final_lr == ours.optim.base_lr == 4.8
    assert parsed(["/images", "--batch-size", "40"], 4).optim.batch_size == 10
    assert parsed(["--data_path", "/images", "--batch-size", "40"], 4).optim.batch_size == 40
    assert parsed(["--data_path", "/images", "-b", "40"], 4).optim.batch_size == 10
    assert parsed(["--data_path=/images"]) == replace(Config(), data=replace(Config().data, data_path="/images"))


SCHEDULES = Golden("lr_schedules")
CASES = [name.removesuffix("_params") for name in SCHEDULES.names() if name.startswith("sc_") and "_params" in name]


@pytest.mark.parametrize("case", CASES)
def test_schedule_equals_the_published_one(case: str) -> None:
    given = SCHEDULES.params(case)
    flags = {"lr": "base_value", "final-lr": "final_value", "epochs": "epochs", "warmup-epochs": "warmup_epochs"}
    told = {name: given[key] for name, key in {**flags, "start-warmup": "start_warmup_value"}.items()}
    words = [word for name, value in told.items() if value is not None for word in (f"--{name}", str(value))]
    rate = warmup_and_cosine(parsed(["/images", "--cos", *words]), given["niter_per_ep"])
    for step, expected in zip(SCHEDULES[f"{case}_index"], SCHEDULES[f"{case}_lr"], strict=True):
        assert abs(rate(int(step)) - expected) < 1e-10


def test_our_booleans_are_not_taken_for_the_folder() -> None:
    ours = parsed(["--channels_last", "off", "--use_bn", "no", "--compile", "--data_path", "/images"])
    assert ours.data.data_path == "/images" and ours.optim.optimizer == "lars"
    assert (ours.model.channels_last, ours.model.use_bn, ours.model.compile) == (False, False, True)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("/images /more", "'/more': not expected here, the folder of images is '/images'"),
        ("/images -b 3", "-b 3: needs a number of images per node, at least one for each of its 4 ranks"),
        ("/images -b many", "-b many: needs a number"),
        ("/images --lars", "--lars without --sgd"),
        ("/images --resume x.pth", "--resume: a run goes on by itself"),
        ("/images --rm-pretrained-cls", "--rm_pretrained_cls: not here"),
        ("/images --arch vit_small --patch-size 8", "--patch_size 8: the ViTs have patches of 16"),
        ("/images --num-cls 3 --cls-size 10 20", "--num_cls 3 --cls_size 10 20: give one size for each"),
        ("/images --global-crops-scale 0.4", "--global_crops_scale 0.4: give the smallest and the largest"),
        ("--nmb_crops 3 6", "--nmb_crops 3 6: the first number counts the global views"),
        ("--cls_size 10 1", "--cls_size 10 1: must be at least 2"),
        ("--row_tau 0", "--row_tau 0.0: must be above 0"),
        ("--momentum 1", "--momentum 1.0: must be"),
        ("--clas_size 4", "--clas_size: unknown flag; did you mean --cls_size"),
    ],
)
def test_impossible_command_lines(words: str, told: str) -> None:
    with pytest.raises(UserError) as error:
        parsed(words.split(), 4)
    assert str(error.value).startswith(told) and "\n" not in str(error.value)


def submitted(script: str, *args: str, nodes: int, folder: Path) -> subprocess.CompletedProcess:
    """What a batch script does where `srun` only shows the words it is given."""
    srun = folder / "srun"
    srun.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "DATASET_PATH": "${DATASET_PATH}"}
    env |= {"EXPERIMENT_PATH": "${EXPERIMENT_PATH}", "SLURM_JOB_NUM_NODES": str(nodes)}
    return subprocess.run(
        ["bash", f"scripts/{script}", *args], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )


def comparable(config: Config) -> Config:
    """Without what does not change what is computed: address, seed, workers."""
    run = replace(config.run, dist_url="", seed=0)
    groups = config.model.syncbn_process_group_size if config.model.sync_bn == "apex" else 0
    model = replace(config.model, num_cls=0, syncbn_process_group_size=groups)
    return replace(config, run=run, model=model, data=replace(config.data, workers=0))


@NAMED
def test_every_recipe_has_its_launch_command(recipe: dict, tmp_path: Path) -> None:
    """One script for each main recipe; an entry in the table of ablations for all others."""
    name = recipe["name"].rpartition("/")[2]
    if recipe in MAIN:
        script, args = f"selfclassifier_{name.removeprefix('train_')}_pretrain.sh", []
    else:
        script, args = "selfclassifier_ablation.sh", [name.removeprefix("train_100ep_")]
    done = submitted(script, *args, "--checkpoint_freq", "9", nodes=recipe["nodes"], folder=tmp_path)
    assert done.returncode == 0, done.stderr
    words = done.stdout.split("\n")[:-1]
    words = words[words.index("main_selfclassifier.py") + 1 :]
    ours, published = (parsed(flags, recipe["tasks_per_node"]) for flags in (words, recipe["flags"]))
    assert ours.run.checkpoint_freq == 9
    assert comparable(replace(ours, run=replace(ours.run, checkpoint_freq=25))) == comparable(published)
    text = (ROOT / "scripts" / script).read_text()
    if recipe in MAIN:
        assert f"--nodes={recipe['nodes']} --ntasks-per-node={recipe['tasks_per_node']}" in text
        shown = recipe["published"]
        assert f"{shown['linear_top1']} % ImageNet linear top-1" in text
        assert all(f"{word} {shown[key]}" in text for word, key in (("NMI", "NMI"), ("accuracy", "ACC")))


def test_an_ablation_on_another_shape_or_of_another_name_is_refused(tmp_path: Path) -> None:
    wrong = submitted("selfclassifier_ablation.sh", "bs_1024", nodes=11, folder=tmp_path)
    assert wrong.returncode == 2 and "published on 8 nodes" in wrong.stderr
    assert submitted("selfclassifier_ablation.sh", "wd_1", nodes=11, folder=tmp_path).returncode == 2


def test_the_views_are_the_published_ones() -> None:
    crops = Config().data.multicrop()
    assert crops.interpolation == "bicubic" and crops.sizes == ((224, 224),) * 2 + ((96, 96),) * 6
    strengths = crops.strengths
    assert strengths.jitter == (0.4, 0.4, 0.2, 0.1) and strengths.blur_radius == (0.1, 2.0)
    assert strengths.blur_p.tolist() == [0.1, 1.0] + 6 * [0.5]
    assert strengths.solarize_p.tolist() == [0, 0.2] + 6 * [0]
    for found, expected in ((strengths.flip_p, 0.5), (strengths.jitter_p, 0.8), (strengths.gray_p, 0.2)):
        assert found.tolist() == [expected] * 8
    drawn = torch.from_numpy(crops.params(crops.uniforms(1, 0, range(4000))))
    shares = (drawn[:, :, [Param.SIGMA, Param.SOLARIZE]] > 0).float().mean(0)
    expected = torch.tensor([[0.1, 0], [1, 0.2], *[[0.5, 0]] * 6])
    assert (shares - expected).abs().max() < 0.03
    assert AUGMENT.mean == (0.485, 0.456, 0.406) and AUGMENT.std == (0.229, 0.224, 0.225)
    assert main_selfclassifier.DIGITS.data.multicrop().num_views == sum(main_selfclassifier.DIGITS.data.nmb_crops)
