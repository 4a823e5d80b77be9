"""Scripts take packed images where they take folders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clusterssl.data.pack import PackOptions, pack
from tests.launch import TINY, Launched, metrics

SHORT = ["--epochs", "1", "--batch_size", "16"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small dataset with train/ and val/, as folders and packed."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 32), ("val", 8)):
        for i in range(count):
            path = root / "plain" / split / f"class{i % 2}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 128 + 127 * (i % 2), (24, 24, 3), dtype=np.uint8)).save(path)
    pack(root / "plain", root / "packed", PackOptions(shard_images=10, workers=1))
    return root / "plain", root / "packed"


def without(words: list[str], *flags: str) -> list[str]:
    """Words of a command line less some flags of one value each."""
    dropped = {at + step for at, word in enumerate(words) if word in flags for step in (0, 1)}
    return [word for at, word in enumerate(words) if at not in dropped]


def test_training_and_evaluation_are_the_same(folders: tuple[Path, Path], tmp_path: Path) -> None:
    words = [*without(TINY, "--data_path", "--epochs"), *SHORT]
    losses, accuracies = [], []
    for data in folders:
        run = tmp_path / data.name
        codes, said = Launched("main_swav.py", *words, "--data_path", str(data), "--dump_path", str(run)).wait()
        assert codes == [0], said
        losses.append([record["loss"] for record in metrics(run)])
        codes, said = Launched(
            "eval_knn.py", "--pretrained", str(run / "checkpoint.pth.tar"), "--data_path", str(data), "--nb_knn", "3",
            "--dump_path", str(run), "--device", "cpu", "--workers", "0",
        ).wait()  # fmt: skip
        assert codes == [0], said
        lines = (run / "evaluations.jsonl").read_text().splitlines()
        accuracies.append([json.loads(line)["top1"] for line in lines])
    assert losses[0] == losses[1] and losses[0]
    assert accuracies[0] == accuracies[1] and accuracies[0]


def test_a_run_goes_on_with_the_packed_images(folders: tuple[Path, Path], tmp_path: Path) -> None:
    words = without(TINY, "--data_path", "--epochs")
    for data, epochs in zip(folders, ("1", "2"), strict=True):
        flags = ["--batch_size", "16", "--epochs", epochs, "--data_path", str(data), "--cache", "ram"]
        codes, said = Launched("main_swav.py", *words, *flags, "--dump_path", str(tmp_path)).wait()
        assert codes == [0], said
    assert [record["step"] for record in metrics(tmp_path) if "step" in record] == [1, 2, 3, 4]
