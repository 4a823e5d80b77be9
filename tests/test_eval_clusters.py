"""The script eval_clusters.py: a network's own clusters, k-means of any other, superclasses, pictures."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import metrics
from sklearn.cluster import KMeans

import eval_clusters
from clusterssl import config as cfg
from clusterssl import dist
from clusterssl.data import eval_batches, open_source
from clusterssl.errors import UserError
from clusterssl.models.weights import model_from_weights
from tests.evals.checkpoints import own_checkpoint
from tests.evals.logs import restored_logger  # noqa: F401
from tests.ranks import run_ranks
from tests.report.test_page import page_of


def start(folder: Path, *words: object) -> None:
    sys.argv = ["eval_clusters.py", "--data_path", "digits", "--dump_path", str(folder), *map(str, words)]
    eval_clusters.main()


def run(folder: Path, *words: object) -> list[dict[str, Any]]:
    """The records that a command leaves."""
    start(folder, *words)
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]


def test_published_flags_and_defaults() -> None:
    found = cfg.plain(eval_clusters.Config())
    expected = {"cls_num": 0, "num_classes": 15, "num_samples_per_class": 9, "kmeans_cls": "", "superclass": []}
    assert {name: found[name] for name in expected} == expected


def predicted(checkpoint: Path, head: int, red: float = 0.228) -> tuple[np.ndarray, np.ndarray]:
    """Clusters and classes by hand; `red` is what SwAV divides the red channel by."""
    source, network = open_source("digits", split="val"), model_from_weights(str(checkpoint)).eval()
    batches = eval_batches(source, image_size=32, resize=32, batch_size=64, std=(red, 0.224, 0.225))
    return torch.cat([network.predict(batch.images, head) for batch in batches]).numpy(), source.labels


@pytest.mark.parametrize("heads", [(), (12, 30)], ids=["prototypes", "heads"])
def test_own_clusters_of_every_head(tmp_path: Path, heads: tuple[int, ...]) -> None:
    checkpoint = own_checkpoint(tmp_path / "own.pth.tar", heads=heads)
    found = run(tmp_path / "run", "--pretrained", checkpoint, "--cls_num", -1, "--num_classes", 0)
    assert [record["clusters"] for record in found] == [f"head {i}" for i in range(len(heads) or 1)]
    for head, record in enumerate(found):
        clusters, labels = predicted(checkpoint, head, 0.229 if heads else 0.228)
        assert record["nmi"] == pytest.approx(100 * metrics.normalized_mutual_info_score(labels, clusters))
        assert record["ami"] == pytest.approx(100 * metrics.adjusted_mutual_info_score(labels, clusters))
        assert record["ari"] == pytest.approx(100 * metrics.adjusted_rand_score(labels, clusters))
        assert record["clusters_used"] == len(set(clusters))
        purity = metrics.cluster.contingency_matrix(labels, clusters).max(0).sum() / len(labels)
        assert record["label_accuracy"] == pytest.approx(100 * purity)
        assert 0 < record["hungarian_accuracy"] <= record["accuracy"] <= record["label_accuracy"] + 1e-9
    last = run(tmp_path / "one", "--pretrained", checkpoint, "--cls_num", len(found) - 1, "--num_classes", 0)
    assert last[0]["nmi"] == found[-1]["nmi"]


def test_k_means_of_frozen_features_as_scikit_learn_does_it(tmp_path: Path) -> None:
    flags = ["--arch", "conv4w4", "--num_classes", 0, "--kmeans_starts", 3, "--seed", 5]
    (record,) = run(tmp_path / "run", *flags, "--kk", 15, "--cache_features", tmp_path / "kept")
    assert record["clusters"] == "k-means, 15 of backbone features" and record["images"] == 300
    features = {len(rows): rows for rows in map(np.load, (tmp_path / "kept").glob("*.npy"))}
    starts = [KMeans(15, n_init=1, random_state=5 + start).fit(features[1000]) for start in range(3)]
    clusters = min(starts, key=lambda fitted: fitted.inertia_).predict(features[300])
    labels = open_source("digits", split="val").labels
    assert record["nmi"] == pytest.approx(100 * metrics.normalized_mutual_info_score(labels, clusters), abs=0.5)
    (again,) = run(tmp_path / "again", *flags, "--kmeans_cls", tmp_path / "run" / "kmeans.npy")
    assert again["nmi"] == record["nmi"]
    (torch_made,) = run(tmp_path / "torch", *flags, "--kk", 15, "--kmeans_backend", "torch")
    assert torch_made["nmi"] == pytest.approx(record["nmi"], abs=8) and torch_made["nmi"] > 30


def test_a_network_without_clusters_gets_k_means(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = own_checkpoint(tmp_path / "own.pth.tar")
    kept = torch.load(checkpoint, weights_only=True)
    kept["state_dict"] = {n: t for n, t in kept["state_dict"].items() if "proto" not in n and "head" not in n}
    kept["model"] = {"arch": "conv4w8", "stem": "small", "size_crops": [[32, 32]]}
    torch.save(kept, tmp_path / "backbone.pth.tar")
    flags = ["--pretrained", tmp_path / "backbone.pth.tar", "--num_classes", 0, "--kmeans_starts", 1]
    (record,) = run(tmp_path / "run", *flags)
    assert record["clusters"] == "k-means, 10 of backbone features"
    assert "no head that gives clusters" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--clusters heads: .* has no head that gives clusters"):
        run(tmp_path / "run", *flags, "--clusters", "heads")
    (mlp,) = run(tmp_path / "mlp", *flags[2:], "--pretrained", checkpoint, "--clusters", "kmeans", "--use_mlp")
    assert mlp["clusters"] == "k-means, 10 of embedding features"


def test_superclasses_of_a_file(tmp_path: Path) -> None:
    table = tmp_path / "round.json"
    table.write_text(json.dumps({"round": ["0", "6", "8", "9"], "straight": ["1", "4", "7"]}))
    checkpoint = own_checkpoint(tmp_path / "own.pth.tar")
    flags = ["--pretrained", checkpoint, "--num_classes", 0]
    fine, above = run(tmp_path / "run", *flags, "--superclass", table)
    assert (fine["superclass"], above["superclass"]) == ("", str(table))
    labels = open_source("digits", split="val").labels
    assert above["images"] == int(np.isin(labels, [0, 6, 8, 9, 1, 4, 7]).sum()) and above["classes"] == 2
    assert above["accuracy"] > fine["accuracy"]
    with pytest.raises(UserError, match="--superclass 3: holds none of these classes"):
        run(tmp_path / "run", *flags, "--superclass", 3)


def test_pictures_page_and_table(tmp_path: Path) -> None:
    checkpoint = own_checkpoint(tmp_path / "own.pth.tar")
    (record,) = run(tmp_path, "--pretrained", checkpoint, "--num_classes", 4, "--num_samples_per_class", 6)
    clusters, labels = predicted(checkpoint, 0)
    rows = list(csv.DictReader((tmp_path / "clusters-head-0.csv").open()))
    assert {int(row["cluster"]): int(row["images"]) for row in rows} == dict(
        zip(*np.unique(clusters, return_counts=True), strict=True)
    )
    right = sum(int(row["images"]) * float(row["accuracy"]) for row in rows)
    assert right / len(labels) * 100 == pytest.approx(record["accuracy"], abs=1e-3)
    shown = min(4, sum(int(row["images"]) >= 6 for row in rows))
    for name in ("best", "worst", "clearest"):
        with Image.open(tmp_path / f"clusters-head-0-{name}.png") as sheet:
            assert sheet.size == (6 * 134 + 30, shown * 149 + 15)
    page = page_of(tmp_path / "clusters-head-0.html")
    sources = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert len(sources) == 3 * shown and all(source.startswith("data:image/png;base64,") for source in sources)
    text = " ".join(page.texts)
    for words in ("Clusters: head 0", "Clusters of lowest entropy", "Most frequent mistakes", "% right, entropy"):
        assert words in text


def test_bad_input(tmp_path: Path) -> None:
    checkpoint = own_checkpoint(tmp_path / "own.pth.tar")
    np.save(tmp_path / "centres.npy", np.zeros((4, 7), np.float32))
    own = ["--pretrained", checkpoint]
    for words, message in (
        ([*own, "--cls_num", 3], r"--cls_num 3: this network has heads 0 to 0; choose one of them"),
        ([*own, "--cls_num", -2], "--cls_num -2"),
        ([*own, "--kk", 2000], "--kk 2000: only 1000 images to cluster"),
        ([*own, "--clusters", "heads", "--kk", 5], "--clusters heads"),
        ([*own, "--kmeans_cls", tmp_path / "no.npy"], "no.npy: not a readable .npy file"),
        ([*own, "--kmeans_cls", checkpoint], "not a readable .npy file"),
        ([*own, "--kmeans_cls", tmp_path / "centres.npy"], "holds 4x7 numbers, not centres of 64 features"),
        ([*own, "--superclass", "9"], "--superclass 9: neither one of 0 to 8"),
    ):
        with pytest.raises(UserError, match=message):
            run(tmp_path / "out", *words)
    assert not (tmp_path / "out" / "evaluations.jsonl").exists()


def script_on_a_rank(rank: int, world_size: int, folder: str) -> None:
    left, dist.leave = dist.leave, lambda: None  # the test's own process group ends later
    kmeans = ["--clusters", "kmeans", "--kmeans_starts", 3, "--cache_features", f"{folder}/kept"]
    for words in (
        ["--num_classes", 2],
        [*kmeans, "--num_classes", 0],
        [*kmeans, "--kk", 12, "--kmeans_backend", "torch"],
    ):
        start(Path(folder), "--pretrained", Path(folder).parent / "own.pth.tar", *words)
    dist.leave = left


def test_two_ranks_give_the_numbers_of_one(tmp_path: Path) -> None:
    own_checkpoint(tmp_path / "own.pth.tar")
    script_on_a_rank(0, 1, str(tmp_path / "1"))
    run_ranks(script_on_a_rank, 2, str(tmp_path / "2"))
    one, two = (
        [{**json.loads(line), "time": 0, "pretrained": ""} for line in (tmp_path / n / "evaluations.jsonl").open()]
        for n in "12"
    )
    assert one[:2] == two[:2] and len(one) == len(two) == 3
    assert one[2]["nmi"] == pytest.approx(two[2]["nmi"], abs=1)
    for name in ("clusters-head-0.csv", "clusters-head-0-best.png"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
