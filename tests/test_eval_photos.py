"""All protocols on photographs: CIFAR-10 and 16 classes of Tiny ImageNet, beside scikit-learn on the same features."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

import eval_all
import eval_linear
from clusterssl.data import open_source
from tests.evals.logs import restored_logger  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent


def photos(name: str, target: Path, most_train: int, most_val: int) -> Path:
    """Some images of every class, or a visible skip."""
    folder = os.environ.get("CLUSTERSSL_DATA", "")
    archive = Path(folder) / name
    if not folder or not archive.is_file():
        pytest.skip(f"needs real photos: set CLUSTERSSL_DATA to the folder of {name}")
    taken: dict[str, int] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            split, _, rest = member.name.removeprefix("./").partition("/")
            place = f"{split}/{rest.split('/')[0]}"
            most = {"train": most_train, "val": most_val}.get(split, 0)
            if member.isfile() and taken.get(place, 0) < most:
                taken[place] = taken.get(place, 0) + 1
                content = tar.extractfile(member)
                assert content is not None
                path = target / place / Path(member.name).name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content.read())
    return target


def kept(folder: Path, data: Path) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Features that an evaluation kept and the labels, each of the training and of the test images."""
    test_x, train_x = sorted(map(np.load, folder.glob("*.npy")), key=len)
    return [train_x, test_x], [open_source(str(data), split=split).labels for split in ("train", "val")]


def check(folder: Path, data: Path, *words: str) -> dict[str, float]:
    """Run everything and compare with scikit-learn on the kept features; returns the row of the table."""
    command = ["eval_all.py", "--data_path", data, "--dump_path", folder, "--workers", 0, "--nb_knn", 20, *words]
    sys.argv = [str(word) for word in command]
    eval_all.main()
    (row,) = json.loads((folder / "table.json").read_text())["rows"].values()
    (train_x, test_x), (train, test) = kept(folder / "features", data)
    sklearn = KNeighborsClassifier(20, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.1))
    assert row["knn 20 top-1"] == pytest.approx(100 * sklearn.fit(train_x, train).score(test_x, test), abs=1)
    classes = len(set(train))
    starts = [KMeans(classes, n_init=1, random_state=31 + start).fit(train_x) for start in range(10)]
    clusters = min(starts, key=lambda fitted: fitted.inertia_).predict(test_x)
    assert row["clusters nmi"] == pytest.approx(100 * metrics.normalized_mutual_info_score(test, clusters), abs=0.5)
    return row


def check_linear(folder: Path, data: Path, checkpoint: str) -> None:
    """Both minimise the mean cross-entropy + wd / 2 |w|^2, for scikit-learn C = 1 / (images x wd)."""
    words = f"eval_linear.py --wd 1e-3 --epochs 50 --cache_features {folder}/features --workers 0"
    sys.argv = [*words.split(), "--pretrained", checkpoint, "--data_path", str(data), "--dump_path", str(folder)]
    eval_linear.main()
    (train_x, test_x), (train, test) = kept(folder / "features", data)
    model = LogisticRegression(C=1 / (len(train) * 1e-3), max_iter=5000).fit(train_x, train)
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["top1"] == pytest.approx(100 * model.score(test_x, test), abs=1)


def test_an_untrained_network(tmp_path: Path) -> None:
    data = photos("tiny-imagenet-16.tar", tmp_path / "data", 25, 10)
    row = check(
        tmp_path / "all", data, "--arch", "conv4w4", "--image_size", "32", "--protocols", "knn", "linear", "clusters",
        "semisup", "--linear_epochs", "10", "--linear_lr", "3", "--semisup_epochs", "2",
        "--superclass", "1", "entity13",
    )  # fmt: skip
    assert row["knn 20 top-1"] > 10 and row["linear top-1"] > 10  # chance is 6.25
    assert row["clusters accuracy (1)"] > row["clusters accuracy"]
    assert {"semisup 1 % top-1", "semisup 10 % top-1", "clusters accuracy (entity13)"} <= set(row)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "each"), [("cifar10.tar.gz", (500, 100)), ("tiny-imagenet-16.tar", (300, 50))])
def test_a_network_of_our_own_training(tmp_path: Path, name: str, each: tuple[int, int]) -> None:
    data = photos(name, tmp_path / "data", *each)
    words = "--nmb_crops 2 4 --size_crops 32 16 --min_scale_crops 0.3 0.1 --max_scale_crops 1 0.3 --arch conv4 "
    words += "--hidden_mlp 128 --feat_dim 32 --nmb_prototypes 60 --optimizer adamw --base_lr 0.003 --batch_size 200 "
    words += "--epsilon 0.03 --color_jitter 0.5 --epochs 12 --workers 0 --device cpu --report false"
    script = [sys.executable, ROOT / "main_swav.py", "--data_path", data / "train", "--dump_path", tmp_path / "run"]
    subprocess.run([*script, *words.split()], check=True, stdout=subprocess.DEVNULL)
    checkpoint = str(tmp_path / "run" / "checkpoint.pth.tar")
    row = check(
        tmp_path / "all", data, "--pretrained", checkpoint, "--kk", str(len(list((data / "val").iterdir()))),
        "--protocols", "knn", "linear", "clusters", "semisup", "--linear_lr", "1", "--semisup_epochs", "2",
    )  # fmt: skip
    assert row["knn 20 top-1"] > 25 and row["linear top-1"] > 30 and row["semisup 10 % top-1"] > 20
    check_linear(tmp_path / "linear", data, checkpoint)
