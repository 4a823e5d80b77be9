"""The script eval_knn.py from command line to record."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

import eval_knn
from clusterssl import config as cfg
from clusterssl.data import open_source
from clusterssl.errors import UserError
from tests.evals.checkpoints import own_checkpoint
from tests.evals.logs import records, restored_logger  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["eval_knn.py", *map(str, words)])
    eval_knn.main()


def test_flags_and_defaults() -> None:
    found = cfg.plain(eval_knn.Config())
    expected = {
        "pretrained": "", "arch": "resnet50", "stem": "auto", "image_size": 0, "val_split": "val", "batch_size": 256,
        "nb_knn": [10, 20, 100, 200], "temperature": 0.1, "workers": 10, "dump_path": ".", "seed": 31, "use_mlp": False,
        "label_subset": 100.0, "label_list": "", "cache_features": "",
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected


def test_untrained_network_on_the_digits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data_path", "digits", "--arch", "conv4w4", "--dump_path", tmp_path]
    run(monkeypatch, *flags, "--nb_knn", 1, 20, 2000)
    found = records(tmp_path)
    assert [record["k"] for record in found] == [1, 20, 1000]
    assert 60 < found[0]["top1"] < found[0]["top5"] <= 100  # chance is 10
    assert found[1]["split"] == "val" and found[1]["eval"] == "knn" and found[1]["data_path"] == "digits"
    shown = capsys.readouterr().out
    for piece in ("untrained", "images/s", "MiB", "[2000] lowered to 1000", f"{found[1]['top1']:6.2f}"):
        assert piece in shown
    run(monkeypatch, *flags, "--nb_knn", 20, "--val_split", "test")
    last = records(tmp_path)[-1]
    assert last["split"] == "test" and last["top1"] != found[1]["top1"]


def kept(folder: Path) -> dict[int, np.ndarray]:
    """Kept features by number of images."""
    return {len(rows): rows for rows in map(np.load, folder.glob("*.npy"))}


def test_scikit_learn_on_the_kept_features_agrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--data_path", "digits", "--arch", "conv4w4", "--dump_path", tmp_path / "run"]
    run(monkeypatch, *flags, "--nb_knn", 1, 20, 100, "--cache_features", tmp_path / "kept")
    features = kept(tmp_path / "kept")
    labels = [open_source("digits", split=split).labels for split in ("train", "val")]
    for record in records(tmp_path / "run"):
        sklearn = KNeighborsClassifier(
            record["k"], metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.1)
        ).fit(features[1000], labels[0])
        assert record["top1"] == pytest.approx(100 * sklearn.score(features[300], labels[1]), abs=0.4)  # one image


def test_kept_features_give_the_same_numbers_without_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data_path", "digits", "--arch", "conv4w4", "--cache_features", tmp_path / "kept"]
    found = []
    for name in ("first", "again"):
        run(monkeypatch, *flags, "--dump_path", tmp_path / name)
        found.append([{**record, "time": 0} for record in records(tmp_path / name)])
    assert found[0] == found[1]
    assert capsys.readouterr().out.count("features read from") == 4
    assert len(list((tmp_path / "kept").glob("*.npy"))) == 2


def test_few_labels_and_features_after_the_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = own_checkpoint(tmp_path / "own.pth.tar")
    flags = ["--data_path", "digits", "--pretrained", checkpoint, "--nb_knn", 5, "--dump_path", tmp_path]
    for words in ([], ["--label_subset", 10], ["--label_subset", 1], ["--use_mlp"]):
        run(monkeypatch, *flags, *words)
    everything, ten, one, mlp = records(tmp_path)
    assert [r["labelled_images"] for r in (everything, ten, one, mlp)] == [1000, 100, 10, 1000]
    assert everything["top1"] > ten["top1"] > one["top1"] > 10
    assert (everything["features"], mlp["features"]) == ("backbone", "embedding")
    assert mlp["top1"] != everything["top1"]
    names = tmp_path / "names.txt"
    source = open_source("digits", split="train")
    names.write_text("".join(f"{source.name(i).removeprefix('digits/')}\n" for i in range(40)))
    run(monkeypatch, *flags, "--label_list", names)
    assert records(tmp_path)[-1]["labelled_images"] == 40


def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digits = ["--data_path", "digits", "--dump_path", tmp_path / "out"]
    names = tmp_path / "names.txt"
    names.write_text("n01440764_18.JPEG\n")
    headed = own_checkpoint(tmp_path / "headed.pth.tar", heads=(5,))
    for words, message in (
        ([], "--data_path: name the folder"),
        (["--data_path", tmp_path / "nowhere"], "does not exist"),
        (["--data_path", tmp_path], "expected train/ and val/"),
        ([*digits, "--pretrained", tmp_path / "no.pth"], "no such checkpoint"),
        ([*digits, "--nb_knn", 0], "start at 1"),
        ([*digits, "--nb-kn", 3], "did you mean --nb_knn"),
        ([*digits, "--arch", "resnet51"], "nearest: resnet"),
        ([*digits, "--arch", "resnet18", "--pretrained", headed], "--arch resnet18: .* trained with arch conv4w8"),
        ([*digits, "--arch", "conv4w4", "--use_mlp"], "--pretrained: name the checkpoint"),
        ([*digits, "--use_mlp", "--pretrained", headed], "--use_mlp: this network has no projection head"),
        ([*digits, "--arch", "conv4w4", "--label_list", names], "1 of 1 names are no training images"),
    ):
        with pytest.raises(UserError, match=message):
            run(monkeypatch, *words)
    assert not (tmp_path / "out").exists()


def test_exit_code_and_one_line_from_another_folder(tmp_path: Path) -> None:
    """In a process of its own, without the package on the path."""
    done = subprocess.run([sys.executable, ROOT / "eval_knn.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("eval_knn.py: error: --data_path") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
