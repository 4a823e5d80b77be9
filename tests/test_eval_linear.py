"""The script eval_linear.py from command line to record, alone and on two ranks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import eval_knn
import eval_linear
from clusterssl import config as cfg
from clusterssl import dist
from clusterssl.dist import World
from clusterssl.errors import UserError
from clusterssl.evals import inputs
from clusterssl.evals.classifier import LinearClassifier, Pooled, epoch_order
from clusterssl.models.build import build_backbone, build_model
from clusterssl.models.weights import published_state_dict
from tests.evals.logs import restored_logger  # noqa: F401
from tests.ranks import run_ranks

PUBLISHED = {
    "dump_path": ".", "seed": 31, "data_path": "/path/to/imagenet", "workers": 10, "arch": "resnet50",
    "pretrained": "", "global_pooling": True, "use_bn": False, "epochs": 100, "batch_size": 32, "lr": 0.3, "wd": 1e-6,
    "nesterov": False, "scheduler_type": "cosine", "decay_epochs": [60, 80], "gamma": 0.1, "final_lr": 0,
    "dist_url": "env://", "world_size": -1, "rank": 0, "local_rank": 0,
}  # fmt: skip
SYNTHETIC = ["--data_path", "synthetic:60:24x24:3", "--image_size", "24", "--arch", "conv4w2", "--epochs", "3"]


def run(folder: Path, *words: object) -> dict[str, Any]:
    """The checkpoint that a command leaves."""
    sys.argv = ["eval_linear.py", "--dump_path", str(folder), *map(str, words)]
    eval_linear.main()
    return torch.load(folder / "checkpoint.pth.tar", weights_only=True)


@pytest.fixture(autouse=True)
def own_argv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", list(sys.argv))


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]


def test_published_flags_and_defaults() -> None:
    found = cfg.plain(eval_linear.Config())
    assert {name: found[name] for name in PUBLISHED} == PUBLISHED


def test_published_command_line_parses() -> None:
    words = "--data_path /imagenet --pretrained swav_800ep_pretrain.pth.tar --local_rank=3 --decay_epochs 30 60 90"
    config = cfg.parse(eval_linear.Config, [*words.split(), "--use_bn", "true", "--scheduler_type", "step"])
    assert config.optim.decay_epochs == (30, 60, 90) and config.classifier.use_bn
    with pytest.raises(UserError, match="--scheduler_type"):
        cfg.parse(eval_linear.Config, ["--scheduler_type", "linear"])


def test_digits_with_an_own_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = build_model("conv4w8", "small", 8, 4, 5)
    meta = {"arch": "conv4w8", "stem": "small", "size_crops": [[32, 32]]}
    torch.save({"state_dict": published_state_dict(model), "model": meta}, tmp_path / "own.pth.tar")
    flags = ["--data_path", "digits", "--pretrained", tmp_path / "own.pth.tar", "--epochs", 8, "--lr", 3]
    state = run(tmp_path / "run", *flags)
    assert state["best_acc"] > 50  # chance is 10
    assert tuple(state["state_dict"]["module.linear.weight"].shape) == (10, 64)
    (record,) = records(tmp_path / "run")
    assert record["top1"] == state["best_acc"] and record["eval"] == "linear" and record["arch"] == "conv4w8"
    shown = capsys.readouterr().out
    assert "--arch conv4w8: taken from" in shown and "features computed once" in shown and "images/s" in shown
    run(tmp_path / "run", *flags)
    assert "resuming after epoch 8" in capsys.readouterr().out
    assert len(records(tmp_path / "run")) == 1
    few = run(tmp_path / "few", *flags, "--labels_per_class", 2)
    assert 10 < few["best_acc"] < state["best_acc"]


@pytest.mark.parametrize("augmentation", ["rrc", "none"])
def test_resuming_is_bit_exact(tmp_path: Path, augmentation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = [*SYNTHETIC, "--train_augmentation", augmentation, "--batch_size", 16]
    whole = run(tmp_path / "whole", *flags)
    epoch = eval_linear.Protocol.epoch

    def killed_in_epoch_2(self: eval_linear.Protocol, number: int) -> dict[str, float]:
        numbers = epoch(self, number)
        if number == 2:
            raise RuntimeError("killed")
        return numbers

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(eval_linear.Protocol, "epoch", killed_in_epoch_2)
        run(tmp_path / "broken", *flags)
    resumed = run(tmp_path / "broken", *flags)
    assert resumed["epoch"] == whole["epoch"] == 3
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, resumed["state_dict"][name]), name
    assert resumed["best"] == whole["best"]


def test_random_crops_and_their_seed_make_a_difference(tmp_path: Path) -> None:
    weights = {}
    for name, words in {
        "none": ["--train_augmentation", "none"], "auto": [], "rrc": ["--train_augmentation", "rrc"],
    }.items():  # fmt: skip
        weights[name] = run(tmp_path / name, *SYNTHETIC, *words)["state_dict"]["module.linear.weight"]
    assert torch.equal(weights["auto"], weights["none"])
    assert not torch.allclose(weights["rrc"], weights["none"])


def test_every_epoch_sees_other_crops_of_every_image() -> None:
    config = cfg.parse(eval_linear.Config, [*SYNTHETIC, "--train_augmentation", "rrc", "--batch_size", "16"])
    train, val = inputs.open_splits(config.data)
    network = inputs.open_network(config.network, data_path="synthetic", seed=1, argv=SYNTHETIC)
    protocol = eval_linear.Protocol(config, World(), network, train, val)
    protocol.prepare()
    by_image = []
    for epoch in range(2):
        steps = list(protocol.steps(epoch))
        assert [len(step.labels) for step in steps] == [16, 16, 16, 12]  # the incomplete step is kept
        by_image.append(torch.empty(60, 16))
        by_image[-1][epoch_order(60, config.seed, epoch)] = torch.cat([step.features for step in steps])
    assert ((by_image[0] - by_image[1]).abs().amax(1) > 1e-4).sum() > 55


def test_windows_and_batchnorm(tmp_path: Path) -> None:
    flags = [*SYNTHETIC, "--image_size", 64, "--global_pooling", "false"]
    shapes = {
        name: tuple(x.shape) for name, x in run(tmp_path / "bn", *flags, "--use_bn", "true")["state_dict"].items()
    }
    assert shapes["module.linear.weight"] == (3, 16 * 3 * 3)
    assert shapes["module.bn.weight"] == (16,)
    with pytest.raises(UserError, match="needs a map of 6x6"):
        run(tmp_path / "small", *SYNTHETIC, "--global_pooling", "false")


def test_the_wide_network_of_factor_five() -> None:
    """The published script does not know its 10240 features; shapes only, its weights would take gigabytes."""
    with torch.device("meta"):
        features = Pooled(build_backbone("resnet50w5")).eval()(torch.empty(2, 3, 224, 224))
    assert features.shape == (2, 10240)
    assert LinearClassifier(features.shape[1:], 7)(torch.zeros(2, 10240)).shape == (2, 7)


def test_bad_input(tmp_path: Path) -> None:
    digits = ["--data_path", "digits"]
    for words, message in (
        ([], "--data_path: name the folder"),
        (["--data_path", tmp_path / "nowhere"], "does not exist"),
        ([*digits, "--epochs", 0], "--epochs 0"),
        ([*digits, "--labels_per_class", 500], "--labels_per_class 500"),
        ([*digits, "--scheduler", "step"], "did you mean --scheduler_type"),
    ):
        with pytest.raises(UserError, match=message):
            run(tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def scripts_on_a_rank(rank: int, world_size: int, folder: str) -> None:
    left, dist.leave = dist.leave, lambda: None  # the test's own process group ends later
    batch = ["--batch_size", str(16 // world_size)]
    for augmentation in ("rrc", "none"):
        run(Path(folder) / augmentation, *SYNTHETIC, "--train_augmentation", augmentation, *batch)
    sys.argv = ["eval_knn.py", "--data_path", "digits", "--arch", "conv4w4", "--dump_path", folder]
    eval_knn.main()
    dist.leave = left


def test_two_ranks_give_the_numbers_of_one(tmp_path: Path) -> None:
    scripts_on_a_rank(0, 1, str(tmp_path / "1"))
    run_ranks(scripts_on_a_rank, 2, str(tmp_path / "2"))
    neighbours = [[{**record, "time": 0} for record in records(tmp_path / n)] for n in "12"]
    assert neighbours[0] == neighbours[1] and len(neighbours[0]) == 4
    for name in ("rrc", "none"):
        one, two = (torch.load(tmp_path / n / name / "checkpoint.pth.tar", weights_only=True) for n in "12")
        assert one["best_acc"] == two["best_acc"]
        for key, tensor in one["state_dict"].items():
            assert two["state_dict"][key].numpy() == pytest.approx(tensor.numpy(), abs=1e-5), key
        losses = [records(tmp_path / n / name)[0]["val_loss"] for n in "12"]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
