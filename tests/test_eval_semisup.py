"""The script eval_semisup.py: flags, two learning rates, kills, ranks, its checkpoint."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import eval_semisup
from clusterssl import config as cfg
from clusterssl import dist
from clusterssl.data import eval_batches, open_source
from clusterssl.errors import UserError
from clusterssl.evals.classifier import epoch_order
from clusterssl.evals.finetuning import FinetuneOptions, Finetuning, Logits
from clusterssl.evals.subsets import stratified
from clusterssl.models.build import build_backbone
from clusterssl.models.weights import backbone_from_weights, model_from_weights
from tests.evals.checkpoints import own_checkpoint
from tests.evals.logs import records, restored_logger  # noqa: F401
from tests.ranks import run_ranks

TABLE = Path(__file__).parent / "golden" / "published_flags.json"
SYNTHETIC = ["--data_path", "synthetic:120:24x24:3", "--image_size", "20", "--arch", "conv4w2", "--epochs", "3"]


def run(folder: Path, *words: object) -> dict[str, Any]:
    """The checkpoint that a command leaves."""
    sys.argv = ["eval_semisup.py", "--dump_path", str(folder), *map(str, words)]
    eval_semisup.main()
    return torch.load(folder / "checkpoint.pth.tar", weights_only=True)


def test_published_flags_and_defaults() -> None:
    found = cfg.plain(eval_semisup.Config())
    for flag in json.loads(TABLE.read_text())["eval_semisup"]:
        name, default = flag["dest"], flag["default"]
        expected = float(default) if name == "labels_perc" else default
        assert found[name] == expected, name


@pytest.mark.parametrize(
    "words", ["--labels_perc 10 --lr 0.01 --lr_last_layer 0.2", "--labels_perc 1 --lr 0.02 --lr_last_layer 5"]
)
def test_published_command_lines_parse(words: str) -> None:
    config = cfg.parse(eval_semisup.Config, ["--data_path", "/imagenet", "--pretrained", "x.pth", *words.split()])
    assert config.finetune.rates(0) == (config.finetune.lr, config.finetune.lr_last_layer)
    assert config.finetune.rates(19) == pytest.approx([0.04 * rate for rate in config.finetune.rates(0)])


def test_an_epoch_equals_plain_torch(tmp_path: Path) -> None:
    """All parameters by hand: crops, order, two learning rates, momentum over epochs."""
    words = [*SYNTHETIC, "--labels_perc", "50", "--batch_size", "16", "--lr", "0.05", "--lr_last_layer", "0.4"]
    state = run(tmp_path, *words, "--decay_epochs", "2", "--gamma", "0.5")["state_dict"]
    torch.manual_seed(31)
    net = Logits(build_backbone("conv4w2", "small"), 3, 31).train()
    source = open_source("synthetic:120:24x24:3", split="train")
    chosen = stratified(source.labels, 50, 31)
    trunk, last = net.module.backbone.parameters(), net.module.projection_head.parameters()
    optimizer = torch.optim.SGD([{"params": trunk, "lr": 0.05}, {"params": last, "lr": 0.4}], momentum=0.9)
    for epoch in range(3):
        if epoch == 2:
            for group in optimizer.param_groups:
                group["lr"] *= 0.5
        rows = chosen[epoch_order(60, 31, epoch).numpy()]
        for batch in eval_batches(source, rows, image_size=20, batch_size=16, train_augment=True, seed=31, epoch=epoch):
            optimizer.zero_grad()
            F.cross_entropy(net(batch.images), batch.labels).backward()
            optimizer.step()
    head = net.module.projection_head
    assert torch.allclose(state["module.projection_head.weight"], head.weight, atol=1e-5)
    assert torch.allclose(state["module.conv1.weight"], net.module.backbone.conv1.weight, atol=1e-5)
    assert torch.allclose(state["module.bn4.running_var"], net.module.backbone.bn4.running_var, atol=1e-5)


def test_the_first_weights_of_the_classifier() -> None:
    torch.manual_seed(0)
    backbone = build_backbone("conv4w32", "small")
    head = Logits(backbone, 500, 7).module.projection_head
    expected = nn.Linear(256, 500)
    assert float(head.weight.std()) == pytest.approx(float(expected.weight.std()), rel=0.02)
    assert float(head.bias.abs().max()) <= 1 / 16


def test_digits_and_what_the_checkpoint_is_good_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = own_checkpoint(tmp_path / "own.pth.tar")
    flags = ["--data_path", "digits", "--pretrained", checkpoint, "--labels_perc", 50, "--lr_last_layer", 0.5]
    flags += ["--epochs", 8, "--decay_epochs", 5, 7, "--lr", 0.1]
    state = run(tmp_path / "run", *flags)
    (record,) = records(tmp_path / "run")
    assert state["best_acc"] == record["top1"] > 60  # chance is 10
    assert record["labelled_images"] == 498  # half of every class
    best = tmp_path / "run" / "checkpoints" / "best.pth.tar"
    assert list(torch.load(best, weights_only=True)["state_dict"])[-2:] == [
        "module.projection_head.weight", "module.projection_head.bias",
    ]  # fmt: skip
    tuned = model_from_weights(str(best)).eval()
    val = open_source("digits", split="val")
    (batch,) = eval_batches(val, image_size=32, resize=32, batch_size=300)
    with torch.no_grad():
        scores = tuned.projection_head(tuned.backbone(batch.images))
    top1 = 100 * float((scores.argmax(1) == batch.labels).float().mean())
    assert top1 == pytest.approx(record["top1"], abs=1e-4)
    before, after = (backbone_from_weights(str(path)).conv1.weight for path in (checkpoint, best))
    assert not torch.allclose(before, after)  # the trunk is trained, too
    run(tmp_path / "run", *flags)
    assert "resuming after epoch 8" in capsys.readouterr().out and len(records(tmp_path / "run")) == 1
    with pytest.raises(UserError, match=r"lr was 0\.1 and is now 0\.2"):
        run(tmp_path / "run", *flags, "--lr", 0.2)


def test_resuming_is_bit_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = [*SYNTHETIC, "--labels_perc", 50, "--batch_size", 16]
    whole = run(tmp_path / "whole", *flags)
    epoch = Finetuning.epoch

    def killed_in_epoch_1(self: Finetuning, number: int) -> dict[str, float]:
        numbers = epoch(self, number)
        if number == 1:
            raise RuntimeError("killed")
        return numbers

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(Finetuning, "epoch", killed_in_epoch_1)
        run(tmp_path / "broken", *flags)
    resumed = run(tmp_path / "broken", *flags)
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, resumed["state_dict"][name]), name
    assert resumed["best"] == whole["best"]


def test_other_labels_are_another_run(tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("".join(f"{i}\n" for i in range(12)))
    flags = [*SYNTHETIC, "--labels_perc", 10]
    run(tmp_path / "run", *flags)
    with pytest.raises(UserError, match="labelled was"):
        run(tmp_path / "run", *flags, "--label_list", names)
    state = run(tmp_path / "listed", *flags, "--label_list", names)
    assert state["epoch"] == 3 and records(tmp_path / "listed")[0]["labelled_images"] == 12


def test_bad_input(tmp_path: Path) -> None:
    for words, message in (
        ([], "--data_path: name the folder"),
        ([*SYNTHETIC, "--labels_perc", 0], "--labels_perc 0"),
        ([*SYNTHETIC, "--label_list", tmp_path / "no.txt"], "--label_list .*no.txt: cannot be read"),
        ([*SYNTHETIC, "--lr", -1], "--lr -1"),
        ([*SYNTHETIC, "--pretrained", own_checkpoint(tmp_path / "w.pth.tar"), "--arch", "conv4w2"], "--arch conv4w2"),
    ):
        with pytest.raises(UserError, match=message):
            run(tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()
    assert FinetuneOptions().epochs == 20


def script_on_a_rank(rank: int, world_size: int, folder: str) -> None:
    left, dist.leave = dist.leave, lambda: None  # the test's own process group ends later
    words = ["--data_path", "synthetic:121:24x24:3", "--labels_perc", 51, "--batch_size", 20 // world_size]
    run(Path(folder), *SYNTHETIC, *words)
    dist.leave = left


def test_two_ranks_give_the_numbers_of_one(tmp_path: Path) -> None:
    """61 images in steps of 20: the last step has one image, so that one of two ranks has none."""
    script_on_a_rank(0, 1, str(tmp_path / "1"))
    run_ranks(script_on_a_rank, 2, str(tmp_path / "2"))
    one, two = (torch.load(tmp_path / n / "checkpoint.pth.tar", weights_only=True) for n in "12")
    for key, tensor in one["state_dict"].items():
        assert two["state_dict"][key].numpy() == pytest.approx(tensor.numpy(), abs=1e-4), key
    a, b = records(tmp_path / "1")[0], records(tmp_path / "2")[0]
    assert a["top1"] == b["top1"] and a["val_loss"] == pytest.approx(b["val_loss"], rel=1e-4)
