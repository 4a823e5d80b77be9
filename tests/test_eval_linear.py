"""The script eval_linear.py from command line to record, alone and on two ranks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import eval_knn
import eval_linear
from clusterssl import config as cfg
from clusterssl import dist
from clusterssl.data import open_source
from clusterssl.errors import UserError
from clusterssl.evals import probing
from clusterssl.evals.classifier import LinearClassifier, Pooled, epoch_order
from clusterssl.evals.probing import Probing, presets
from clusterssl.evals.setup import open_setup
from clusterssl.models.build import build_backbone
from tests.evals.checkpoints import own_checkpoint
from tests.evals.logs import records, restored_logger  # noqa: F401
from tests.launch import Launched
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


def test_published_flags_and_defaults() -> None:
    found = cfg.plain(eval_linear.Config())
    assert {name: found[name] for name in PUBLISHED} == PUBLISHED


def test_published_command_line_parses() -> None:
    words = "--data_path /imagenet --pretrained swav_800ep_pretrain.pth.tar --local_rank=3 --decay_epochs 30 60 90"
    config = cfg.parse(eval_linear.Config, [*words.split(), "--use_bn", "true", "--scheduler_type", "step"])
    assert config.optim.decay_epochs == (30, 60, 90) and config.classifier.use_bn
    with pytest.raises(UserError, match="--scheduler_type"):
        cfg.parse(eval_linear.Config, ["--scheduler_type", "linear"])


@pytest.mark.parametrize(
    ("preset", "arch", "expected"),
    [
        ("swav", "resnet50", {"lr": 0.3, "epochs": 100, "batch_size": 32, "layers": []}),
        ("selfclassifier", "resnet50", {"lars": True, "lr": 0.8, "wd": 0, "scheduler_type": "cosine"}),
        ("deepcluster", "sobel:deepcluster_alexnet", {"lr": 0.01, "wd": 1e-4, "epochs": 90, "batch_size": 256}),
        ("deepcluster", "sobel:deepcluster_vgg16", {"scheduler_type": "inverse_sqrt", "layer_pooling": "avg"}),
        ("sela", "sela_alexnet", {"lr": 0.01, "decay_epochs": [10, 20, 30], "tencrops": True, "epochs": 36}),
        ("sela", "sela_resnetv2", {"lr": 0.1, "wd": 0, "decay_epochs": [85, 128], "frozen_bn": "batch", "epochs": 146}),
    ],
)  # fmt: skip
def test_presets(preset: str, arch: str, expected: dict[str, Any]) -> None:
    found = cfg.plain(cfg.parse(eval_linear.Config, presets(preset, arch)))
    assert {name: found[name] for name in expected} == expected
    given = cfg.parse(eval_linear.Config, [*presets(preset, arch), "--lr", "7", "--layers", "conv2"])
    assert given.optim.lr == 7 and given.classifier.layers == ("conv2",)


def test_digits_with_an_own_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = own_checkpoint(tmp_path / "own.pth.tar")
    flags = ["--data_path", "digits", "--pretrained", checkpoint, "--epochs", 8, "--lr", 3]
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


@pytest.fixture(scope="module")
def knows_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of a network whose features are good for digits."""
    folder = tmp_path_factory.mktemp("tuned")
    words = "--data_path digits --arch conv4w8 --labels_perc 100 --epochs 8 --decay_epochs 5 7 --lr 0.1 --device cpu"
    codes, printed = Launched("eval_semisup.py", *words.split(), "--dump_path", str(folder)).wait()
    assert codes == [0], printed
    return folder / "checkpoints" / "best.pth.tar"


def test_scikit_learn_on_the_kept_features_is_within_a_point(tmp_path: Path, knows_digits: Path) -> None:
    """Both minimise the same: mean cross-entropy + wd / 2 |w|^2, for scikit-learn C = 1 / (images x wd)."""
    flags = ["--data_path", "digits", "--val_split", "test", "--pretrained", knows_digits]
    run(tmp_path / "run", *flags, "--epochs", 40, "--wd", 1e-3, "--cache_features", tmp_path / "kept")
    features = {len(rows): rows for rows in map(np.load, (tmp_path / "kept").glob("*.npy"))}
    train, test = (open_source("digits", split=split).labels for split in ("train", "test"))
    sklearn = LogisticRegression(C=1 / (1000 * 1e-3), max_iter=5000).fit(features[1000], train)
    expected = 100 * sklearn.score(features[497], test)
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert expected > 80 and last["top1"] == pytest.approx(expected, abs=1.0)


@pytest.mark.parametrize("words", [["rrc"], ["none"], ["crop"], ["rrc", "--frozen_bn", "batch"]], ids=" ".join)
def test_resuming_is_bit_exact(tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    flags = [*SYNTHETIC, "--train_augmentation", *words, "--batch_size", 16]
    whole = run(tmp_path / "whole", *flags)
    epoch = Probing.epoch

    def killed_in_epoch_2(self: Probing, number: int) -> dict[str, float]:
        numbers = epoch(self, number)
        if number == 2:
            raise RuntimeError("killed")
        return numbers

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(Probing, "epoch", killed_in_epoch_2)
        run(tmp_path / "broken", *flags)
    resumed = run(tmp_path / "broken", *flags)
    assert resumed["epoch"] == whole["epoch"] == 3
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, resumed["state_dict"][name]), name
    assert resumed["best"] == whole["best"]


def test_how_training_images_are_cut_makes_a_difference(tmp_path: Path) -> None:
    weights = {}
    for name in ("none", "auto", "rrc", "crop"):
        words = [] if name == "auto" else ["--train_augmentation", name]
        weights[name] = run(tmp_path / name, *SYNTHETIC, *words)["state_dict"]["module.linear.weight"]
    assert torch.equal(weights["auto"], weights["none"])
    for a, b in (("rrc", "none"), ("crop", "rrc")):
        assert not torch.allclose(weights[a], weights[b])


def test_every_epoch_sees_other_crops_of_every_image() -> None:
    words = [*SYNTHETIC, "--train_augmentation", "rrc", "--batch_size", "16"]
    config = cfg.parse(eval_linear.Config, words)
    sys.argv = ["eval_linear.py", *words]
    setup = open_setup(config, config.network)
    linear = Probing(setup, config.classifier, config.optim)
    linear.prepare()
    by_image = []
    for epoch in range(2):
        steps = list(linear.steps(epoch))
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


def test_a_probe_on_every_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--layers", "conv1", "conv3", "conv4", "--layer_pooling", "max", "--layer_bn", "--init", "xavier"]
    flags = ["--data_path", "digits", "--arch", "conv4w4", "--lr", "0.1", "--batch_size", "100", "--epochs", "3"]
    state = run(tmp_path, *flags, *words)
    found = records(tmp_path)
    assert [record["layer"] for record in found] == ["conv1", "conv3", "conv4"]
    assert min(record["top1"] for record in found) > 60 and len({record["top1"] for record in found}) > 1
    assert max(record["top1"] for record in found) == state["best_acc"]
    assert {name for name in state["state_dict"] if "conv3" in name} == {
        "module.linear.conv3.weight", "module.linear.conv3.bias", "module.bn.conv3.running_mean",
        "module.bn.conv3.running_var", "module.bn.conv3.num_batches_tracked",
    }  # fmt: skip
    assert "conv3: linear on val: top-1" in capsys.readouterr().out
    again = run(tmp_path, *flags, *words)
    assert again["best_layers"] == state["best_layers"] and len(records(tmp_path)) == 3


def test_ten_crops_and_testing_late(tmp_path: Path) -> None:
    flags = [*SYNTHETIC, "--image_size", 20, "--lr", 3]
    plain = run(tmp_path / "centre", *flags)
    crops = run(tmp_path / "ten", *flags, "--tencrops", "--average", "logits", "--test_from", 2)
    assert torch.equal(*(state["state_dict"]["module.linear.weight"] for state in (plain, crops)))
    lines = [json.loads(line) for line in (tmp_path / "ten" / "metrics.jsonl").read_text().splitlines()]
    assert [line["val_loss"] is None for line in lines] == [True, False, False]
    assert crops["best"]["epoch"] > 1 and crops["best"]["val_loss"] != plain["best"]["val_loss"]


def test_test_features_too_large_for_memory_are_made_anew_every_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    flags = [*SYNTHETIC, "--image_size", 20, "--lr", 3, "--layers", "conv2", "conv4", "--tencrops"]
    held = run(tmp_path / "held", *flags)
    monkeypatch.setattr(probing, "HELD", 100)
    streamed = run(tmp_path / "streamed", *flags)
    assert streamed["best"]["layers"].keys() == held["best"]["layers"].keys()
    for layer, scores in held["best"]["layers"].items():
        assert streamed["best"]["layers"][layer] == pytest.approx(scores, rel=1e-6)


def test_statistics_of_batches_move_and_belong_to_the_checkpoint(tmp_path: Path) -> None:
    state = run(tmp_path, *SYNTHETIC, "--frozen_bn", "batch", "--train_augmentation", "rrc")["state_dict"]
    assert float(state["module.frozen.0.num_batches_tracked"]) == 6  # 2 steps an epoch
    assert float(state["module.frozen.0.running_mean"].abs().max()) > 0
    weight = build_backbone("conv4w2", "small").bn1.weight
    assert torch.equal(state["module.frozen.0.weight"], weight.detach())  # only the statistics do


def test_lars_takes_the_published_rate(tmp_path: Path, knows_digits: Path) -> None:
    words = ["--data_path", "digits", "--preset", "selfclassifier", "--train_augmentation", "none"]
    state = run(tmp_path, *words, "--pretrained", knows_digits, "--epochs", 60, "--batch_size", 50)
    assert state["best_acc"] > 50  # chance is 10; the published run has 25 times as many steps
    assert state["optimizer"]["param_groups"][0]["trust_coefficient"] == 0.001


def test_the_wide_network_of_factor_five() -> None:
    """The published script does not know its 10240 features; shapes only, its weights would take gigabytes."""
    with torch.device("meta"):
        features = Pooled(build_backbone("resnet50w5")).eval()(torch.empty(2, 3, 224, 224))
    assert features.shape == (2, 10240)
    assert LinearClassifier(features.shape[1:], 7)(torch.zeros(2, 10240)).shape == (2, 7)


def test_bad_input(tmp_path: Path) -> None:
    digits = ["--data_path", "digits", "--arch", "conv4w2"]
    for words, message in (
        ([], "--data_path: name the folder"),
        (["--data_path", tmp_path / "nowhere"], "does not exist"),
        ([*digits, "--epochs", 0], "--epochs 0"),
        ([*digits, "--labels_per_class", 500], "--labels_per_class 500"),
        ([*digits, "--scheduler", "step"], "did you mean --scheduler_type"),
        ([*digits, "--layers", "conv7"], "--layers conv7: no such layer in this architecture; choose conv1 to conv4"),
        ([*digits, "--preset", "moco"], "--preset"),
        ([*digits, "--lars", "--nesterov"], "--lars --nesterov"),
    ):
        with pytest.raises(UserError, match=message):
            run(tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


VARIANTS = {
    "rrc": ["--train_augmentation", "rrc"],
    "none": ["--train_augmentation", "none"],
    "layers": ["--layers", "conv2", "conv4", "--layer_bn", "--tencrops", "--image_size", "20", "--lr", "0.01"],
    "batch": ["--frozen_bn", "batch", "--train_augmentation", "crop"],
}


def scripts_on_a_rank(rank: int, world_size: int, folder: str) -> None:
    left, dist.leave = dist.leave, lambda: None  # the test's own process group ends later
    batch = ["--batch_size", str(16 // world_size)]
    for name, words in VARIANTS.items():
        kept = ["--cache_features", f"{folder}/kept"] if name == "layers" else []
        run(Path(folder) / name, *SYNTHETIC, *words, *batch, *kept)
    sys.argv = ["eval_knn.py", "--data_path", "digits", "--arch", "conv4w4", "--dump_path", folder]
    sys.argv += ["--label_subset", "10", "--cache_features", f"{folder}/kept", "--nb_knn", "1", "5", "10", "20"]
    eval_knn.main()
    dist.leave = left


def test_two_ranks_give_the_numbers_of_one(tmp_path: Path) -> None:
    scripts_on_a_rank(0, 1, str(tmp_path / "1"))
    run_ranks(scripts_on_a_rank, 2, str(tmp_path / "2"))
    neighbours = [[{**record, "time": 0} for record in records(tmp_path / n)] for n in "12"]
    assert neighbours[0] == neighbours[1] and len(neighbours[0]) == 4
    for name in VARIANTS:
        one, two = (torch.load(tmp_path / n / name / "checkpoint.pth.tar", weights_only=True) for n in "12")
        assert one["best_acc"] == two["best_acc"]
        for key, tensor in one["state_dict"].items():
            assert two["state_dict"][key].numpy() == pytest.approx(tensor.numpy(), abs=1e-5), key
        assert [r["top1"] for r in records(tmp_path / "1" / name)] == [
            r["top1"] for r in records(tmp_path / "2" / name)
        ]
        if name != "layers":
            losses = [records(tmp_path / n / name)[0]["val_loss"] for n in "12"]
            assert losses[0] == pytest.approx(losses[1], rel=1e-5)
