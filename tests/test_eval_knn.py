"""The script eval_knn.py from command line to record."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import eval_knn
from clusterssl import config as cfg
from clusterssl.errors import UserError
from tests.evals.logs import restored_logger  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["eval_knn.py", *map(str, words)])
    eval_knn.main()


def test_flags_and_defaults() -> None:
    found = cfg.plain(eval_knn.Config())
    expected = {
        "pretrained": "", "arch": "resnet50", "stem": "auto", "image_size": 0, "val_split": "val", "batch_size": 256,
        "nb_knn": [10, 20, 100, 200], "temperature": 0.1, "workers": 10, "dump_path": ".", "seed": 31,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected


def test_untrained_network_on_the_digits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data_path", "digits", "--arch", "conv4w4", "--dump_path", tmp_path]
    run(monkeypatch, *flags, "--nb_knn", 1, 20, 2000)
    records = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert [record["k"] for record in records] == [1, 20, 1000]
    assert 60 < records[0]["top1"] < records[0]["top5"] <= 100  # chance is 10
    assert records[1]["split"] == "val" and records[1]["eval"] == "knn" and records[1]["data_path"] == "digits"
    shown = capsys.readouterr().out
    for piece in ("untrained", "images/s", "MiB", "[2000] lowered to 1000", f"{records[1]['top1']:6.2f}"):
        assert piece in shown
    run(monkeypatch, *flags, "--nb_knn", 20, "--val_split", "test")
    last = json.loads((tmp_path / "evaluations.jsonl").read_text().splitlines()[-1])
    assert last["split"] == "test" and last["top1"] != records[1]["top1"]


def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digits = ["--data_path", "digits", "--dump_path", tmp_path]
    for words, message in (
        ([], "--data_path: name the folder"),
        (["--data_path", tmp_path / "nowhere"], "does not exist"),
        ([*digits, "--pretrained", tmp_path / "no.pth"], "no such checkpoint"),
        ([*digits, "--nb_knn", 0], "start at 1"),
        ([*digits, "--nb-kn", 3], "did you mean --nb_knn"),
        ([*digits, "--arch", "resnet51"], "nearest: resnet"),
    ):
        with pytest.raises(UserError, match=message):
            run(monkeypatch, *words)
    assert not list(tmp_path.iterdir())


def test_exit_code_and_one_line_from_another_folder(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, ROOT / "eval_knn.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("eval_knn.py: error: --data_path") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
