"""The script eval_voc.py from command line to record, alone and on two ranks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import eval_voc
from clusterssl import config as cfg
from clusterssl import dist
from clusterssl.evals import voc
from tests.evals.logs import records, restored_logger  # noqa: F401
from tests.evals.voc import tiny_voc, unpacked
from tests.ranks import run_ranks

PUBLISHED = {
    "vocdir": "", "split": "train", "nit": 80000, "fc6_8": True, "train_batchnorm": False, "eval_random_crops": True,
    "stepsize": 5000, "lr": 0.003, "wd": 1e-6, "min_scale": 0.1, "max_scale": 0.5, "seed": 31,
}  # fmt: skip
TINY = ["--arch", "conv4w4", "--image_size", "24", "--split", "trainval", "--workers", "0", "--batch_size", "8",
        "--fc6_8", "0", "--min_scale", "0.5", "--max_scale", "1", "--device", "cpu"]  # fmt: skip


def run(folder: Path, *words: object) -> int:
    """Exit code of the script."""
    sys.argv = ["eval_voc.py", "--dump_path", str(folder), *map(str, words)]
    with pytest.raises(SystemExit) as end:
        cfg.entry(eval_voc.main)
    return int(end.value.code or 0)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoint.pth.tar", weights_only=True)["state_dict"]


def test_published_flags_and_defaults() -> None:
    found = cfg.plain(eval_voc.Config())
    assert {name: found[name] for name in PUBLISHED} == PUBLISHED
    words = "--vocdir /voc --model alexnet.pth.tar --split trainval --fc6_8 1 --train_batchnorm 1"
    config = cfg.parse(eval_voc.Config, cfg.translate(words.split(), {"model": "pretrained"}))
    assert config.network.pretrained == "alexnet.pth.tar" and config.voc.fc6_8 and config.voc.train_batchnorm


def test_it_learns_and_resumes_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = [*TINY, "--vocdir", tiny_voc(tmp_path), "--lr", 0.02, "--nit", 40, "--stepsize", 30]
    flags += ["--eval_random_crops", 0, "--checkpoint_every", 15]
    assert run(tmp_path / "whole", *flags) == 0
    (record,) = records(tmp_path / "whole")
    chance = 100 * 5 / 9  # an image shows one or two of three classes
    assert record["eval"] == "voc" and record["split"] == "test" and record["map"] > chance + 15
    step = voc.train_step

    def killed_in_step_33(*args: Any) -> torch.Tensor:
        if args[3] == 33:
            raise RuntimeError("killed")
        return step(*args)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(voc, "train_step", killed_in_step_33)
        run(tmp_path / "broken", *flags)
    assert run(tmp_path / "broken", *flags) == 0
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(tmp_path / "broken")[name]), name
    assert records(tmp_path / "broken")[0]["map"] == record["map"]
    assert run(tmp_path / "broken", *flags) == 0 and len(records(tmp_path / "broken")) == 1


def test_learning_rate_is_halved(tmp_path: Path) -> None:
    flags = [*TINY, "--vocdir", tiny_voc(tmp_path), "--nit", 7, "--stepsize", 3, "--checkpoint_every", 1]
    assert run(tmp_path / "run", *flags, "--lr", 0.008) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines] == [0.008] * 3 + [0.004] * 3 + [0.002]


def on_a_rank(rank: int, world_size: int, root: str, out: str) -> None:
    left, dist.leave = dist.leave, lambda: None  # the test's own process group ends later
    flags = [*TINY, "--vocdir", root, "--batch_size", 8 // world_size, "--nit", 6, "--lr", 0.02]
    assert run(Path(out) / "trained", *flags) == 0
    assert run(Path(out) / "svm", *flags, "--svm", "--svm_shots", 0, 2, "--svm_draws", 2) == 0
    dist.leave = left


def test_two_ranks_give_the_numbers_of_one(tmp_path: Path) -> None:
    root = str(tiny_voc(tmp_path))
    on_a_rank(0, 1, root, str(tmp_path / "1"))
    run_ranks(on_a_rank, 2, root, str(tmp_path / "2"))
    for kind, number in (("trained", 1), ("svm", 2)):
        one, two = ([{**record, "time": 0} for record in records(tmp_path / n / kind)] for n in "12")
        assert one == two and len(one) == number
    for name, tensor in weights(tmp_path / "1" / "trained").items():
        torch.testing.assert_close(weights(tmp_path / "2" / "trained")[name], tensor, atol=1e-6, rtol=1e-5)


def test_the_real_subset(tmp_path: Path) -> None:
    folder = unpacked("voc2007-subset", tmp_path)
    flags = ["--vocdir", folder, "--split", "trainval", "--arch", "conv4w4", "--image_size", 32, "--workers", 0]
    assert run(tmp_path / "run", *flags, "--nit", 3, "--eval_random_crops", 0) == 0
    assert run(tmp_path / "run", *flags, "--svm", "--svm_shots", 4, "--svm_draws", 1) == 0
    trained, machines = records(tmp_path / "run")
    assert machines["shots"] == 4 and 5 < trained["map"] < 60 and 5 < machines["map"] < 60


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tiny_voc(tmp_path / "voc")
    (tmp_path / "other").mkdir()
    (root / "VOCdevkit/VOC2007/ImageSets/Main/dog_test.txt").write_text("000024 1\n")
    flags = [*TINY, "--vocdir", root]
    for words, message in (
        (TINY, "--vocdir: name the folder"),
        ([*TINY, "--vocdir", tmp_path / "other"], "holds nothing; expected VOCdevkit/VOC2007"),
        (flags, "trainval and test do not list the same classes (dog)"),
        ([*flags, "--nit", 0], "--nit 0"),
        ([*flags, "--min_scale", 2], "need 0 < min <= max <= 1"),
        ([*flags, "--svm_costs", 0], "--svm_costs"),
        ([*flags, "--split", "test"], "--split"),
    ):
        assert run(tmp_path / "out", *words) == 2
        error = capsys.readouterr().err.strip()
        assert len(error.splitlines()) == 1 and message in error, error
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_stops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*TINY, "--vocdir", tiny_voc(tmp_path), "--nit", 30, "--lr", 1e30]
    assert run(tmp_path / "run", *flags) == 2
    assert "not finite" in capsys.readouterr().err and not (tmp_path / "run" / "checkpoint.pth.tar").exists()
