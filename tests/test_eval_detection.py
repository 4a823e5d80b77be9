"""The script eval_detection.py from command line to record, alone and on two ranks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import eval_detection
from clusterssl import config as cfg
from clusterssl import dist
from clusterssl.evals import detection
from tests.evals.logs import records, restored_logger  # noqa: F401
from tests.evals.voc import tiny_voc, unpacked
from tests.ranks import run_ranks

pytest.importorskip("torchmetrics")
pytest.importorskip("faster_coco_eval")
TINY = ["--arch", "resnet18", "--stem", "imagenet", "--workers", "0", "--device", "cpu", "--test_size", "32",
        "--max_size", "48", "--train_sizes", "32", "40", "--proposals", "8", "--lr", "0.01", "--warmup", "0",
        "--new_bn", "false", "--voc_years", "2007"]  # fmt: skip


def run(folder: Path, *words: object) -> int:
    """Exit code of the script."""
    sys.argv = ["eval_detection.py", "--dump_path", str(folder), *map(str, words)]
    with pytest.raises(SystemExit) as end:
        cfg.entry(eval_detection.main)
    return int(end.value.code or 0)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoint.pth.tar", weights_only=True)["state_dict"]


@pytest.mark.parametrize(("name", "kind"), [("coco-tiny", "mask_rcnn"), ("voc2007-subset", "retinanet")])
def test_two_steps_and_an_evaluation_on_real_images(tmp_path: Path, name: str, kind: str) -> None:
    folder = unpacked(name, tmp_path / "data")
    assert run(tmp_path / "run", *TINY, "--data_path", folder, "--detector", kind, "--steps", 2) == 0
    (record,) = records(tmp_path / "run")
    assert record["eval"] == "detection" and record["detector"] == kind and 0 <= record["map"] < 20
    assert ("segm_map" in record) == (kind == "mask_rcnn")


@pytest.mark.slow
def test_it_resumes_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiny_voc(tmp_path / "data", {"trainval": 7, "test": 4})
    flags = [*TINY, "--data_path", data, "--steps", 5, "--lr_steps", 4, "--checkpoint_every", 3]
    assert run(tmp_path / "whole", *flags) == 0
    step = detection.train_step

    def killed_in_step_4(*args: Any) -> torch.Tensor:
        if args[4] == 4:
            raise RuntimeError("killed")
        return step(*args)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(detection, "train_step", killed_in_step_4)
        run(tmp_path / "broken", *flags)
    torch.manual_seed(99)
    assert run(tmp_path / "broken", *flags) == 0
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(tmp_path / "broken")[name]), name
    one, two = ({**records(tmp_path / name)[0], "time": 0} for name in ("whole", "broken"))
    assert one == two
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["lr"] == pytest.approx(0.001)


def on_a_rank(rank: int, world_size: int, data: str, out: str) -> None:
    left, dist.leave = dist.leave, lambda: None  # the test's own process group ends later
    flags = [*TINY, "--data_path", data, "--steps", 2, "--batch_size", 2 // world_size]
    assert run(Path(out), *flags) == 0
    dist.leave = left


def test_two_ranks_give_the_number_of_one(tmp_path: Path) -> None:
    """Trained by one, tested by two: the run continues after its last step."""
    data, out = str(tiny_voc(tmp_path / "data", {"trainval": 4, "test": 5})), tmp_path / "run"
    on_a_rank(0, 1, data, str(out))
    (one,) = records(out)
    (out / "evaluations.jsonl").unlink()
    run_ranks(on_a_rank, 2, data, str(out))
    assert {**records(out)[0], "time": 0} == {**one, "time": 0}


def trained_on_a_rank(rank: int, world_size: int, data: str, out: str) -> None:
    left, dist.leave = dist.leave, lambda: None  # the test's own process group ends later
    flags = [*TINY, "--data_path", data, "--steps", 1, "--batch_size", 2 // world_size]
    assert run(Path(out) / str(world_size), *flags) == 0
    dist.leave = left


@pytest.mark.slow
def test_two_ranks_train_as_one(tmp_path: Path) -> None:
    """The gradients of a step; those of later steps are of other proposals, which rounding chooses."""
    data = str(tiny_voc(tmp_path / "data", {"trainval": 5, "test": 2}))
    trained_on_a_rank(0, 1, data, str(tmp_path))
    run_ranks(trained_on_a_rank, 2, data, str(tmp_path))
    one, two = (torch.load(tmp_path / n / "checkpoint.pth.tar", weights_only=True)["optimizer"]["state"] for n in "12")
    assert len(one) > 50
    for i in one:
        gradient, other = one[i]["momentum_buffer"], two[i]["momentum_buffer"]
        assert (gradient - other).norm() < 1e-4 * gradient.norm(), i


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tiny_voc(tmp_path / "data", {"trainval": 4, "test": 2})
    flags = [*TINY, "--data_path", data]
    for words, message in (
        (TINY, "--data_path: name the folder"),
        ([*flags, "--voc_years", 2007, 2012], "expected VOCdevkit/VOC2012"),
        ([*flags, "--detector", "mask_rcnn"], "masks need COCO"),
        ([*flags, "--arch", "conv4w4"], "detectors need the four stages"),
        ([*flags, "--steps", 0], "--steps 0"),
        ([*flags, "--detector", "yolo"], "--detector"),
        ([*flags, "--lr", "nan"], "--lr: 'nan'"),
    ):
        assert run(tmp_path / "out", *words) == 2, message
        error = capsys.readouterr().err.strip()
        assert len(error.splitlines()) == 1 and message in error, error
    assert not (tmp_path / "out").exists()
