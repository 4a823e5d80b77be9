"""The script assign.py: labels of a folder by a network's clusters or by k-means, and everything beside them."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import metrics

import assign
from clusterssl.data import eval_batches, open_source
from clusterssl.errors import UserError
from clusterssl.labelling import scan as scanning
from clusterssl.labelling.reading import Reader
from clusterssl.models.build import build_backbone
from clusterssl.models.weights import model_from_weights
from tests.evals.checkpoints import own_checkpoint
from tests.evals.logs import restored_logger  # noqa: F401
from tests.report.test_page import page_of


def run(out: Path, *words: object) -> dict[str, object]:
    """assign.json of a command."""
    sys.argv = ["assign.py", "--out", str(out), "--workers", "0", "--device", "cpu", *map(str, words)]
    assign.main()
    return json.loads((out / "assign.json").read_text())


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits as files, nested in folders; one broken file, one copy in another format, one picture of another kind."""
    folder = tmp_path_factory.mktemp("photos")
    source = open_source("digits", split="val")
    for i in range(120):
        inner = folder / "some" / f"part {i % 2}"
        inner.mkdir(parents=True, exist_ok=True)
        Image.fromarray(source.load(i).permute(1, 2, 0).numpy()).save(inner / f"{i:03}.png")
    Image.fromarray(source.load(5).permute(1, 2, 0).numpy()).save(folder / "copy of 5.jpg", quality=90)
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    Image.fromarray(noise).save(folder / "noise.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no")
    return folder


@pytest.mark.parametrize("heads", [(), (12, 7)], ids=["prototypes", "heads"])
def test_clusters_of_the_network(tmp_path: Path, photos: Path, heads: tuple[int, ...]) -> None:
    checkpoint = own_checkpoint(tmp_path / "own.pth.tar", heads=heads)
    head = len(heads) // 2
    about = run(tmp_path / "out", "--pretrained", checkpoint, "--images", photos, "--cls_num", head)
    source, network = open_source(str(photos)), model_from_weights(str(checkpoint)).eval()
    std = (0.229, 0.224, 0.225) if heads else (0.228, 0.224, 0.225)
    names = [source.name(i) for i in range(len(source))]
    kept = [i for i, name in enumerate(names) if not name.endswith("broken.jpg")]
    (batch,) = eval_batches(source, kept, image_size=32, resize=32, batch_size=200, std=std)
    with torch.no_grad():
        chance = (network.scores([batch.images])[head].double() / (1 if heads else 0.1)).softmax(1).numpy()
    rows = rows_of(tmp_path / "out" / "labels.csv")
    assert [row["path"] for row in rows] == [names[i] for i in kept]
    order = np.argsort(-chance, axis=1)
    assert [int(row["cluster"]) for row in rows] == order[:, 0].tolist() == network.predict(batch.images, head).tolist()
    assert [int(row["second"]) for row in rows] == order[:, 1].tolist()
    found = np.array([[float(row["confidence"]), float(row["second_confidence"])] for row in rows])
    np.testing.assert_allclose(found, np.take_along_axis(chance, order[:, :2], 1), atol=2e-5)
    assert (
        about["clusters"] == ["the network's own clusters", "the network's own clusters, head 1"][head]
        and about["images"] == 122
        and about["unreadable"] == 1
    )
    assert rows_of(tmp_path / "out" / "unreadable.csv")[0]["path"].endswith("broken.jpg")
    sizes = {int(row["cluster"]): int(row["images"]) for row in rows_of(tmp_path / "out" / "clusters.csv")}
    values, counts = np.unique(order[:, 0], return_counts=True)
    assert sizes == dict(zip(values.tolist(), counts.tolist(), strict=True))


def test_parquet_holds_the_csv(tmp_path: Path, photos: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    run(tmp_path / "out", "--pretrained", own_checkpoint(tmp_path / "own.pth.tar"), "--images", photos)
    table = pq.read_table(tmp_path / "out" / "labels.parquet").to_pylist()
    rows = rows_of(tmp_path / "out" / "labels.csv")
    assert [(row["path"], row["cluster"], row["second"]) for row in table] == [
        (row["path"], int(row["cluster"]), int(row["second"])) for row in rows
    ]
    assert [row["confidence"] for row in table] == pytest.approx([float(row["confidence"]) for row in rows], abs=1e-6)


def test_without_pyarrow_there_is_no_parquet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    run(tmp_path / "out", "--pretrained", own_checkpoint(tmp_path / "own.pth.tar"), "--images", "synthetic:20")
    assert not (tmp_path / "out" / "labels.parquet").exists()
    assert "pip install pyarrow" in capsys.readouterr().out


def test_what_is_printed_names_what_was_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = run(tmp_path / "out", "--pretrained", own_checkpoint(tmp_path / "own.pth.tar"), "--images", "synthetic:20")
    said = capsys.readouterr().out
    assert "own.pth.tar: read with its head, which says the clusters" in said
    assert "the network's own clusters: 20 images in" in said
    assert f"duplicates.csv: {about['duplicate_groups']} groups; outliers.csv: {about['outliers']} images" in said
    assert "left aside" not in said, "the prototypes are what is asked"


def test_one_thing_is_not_called_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, colour in enumerate([(200, 10, 10), (200, 10, 10), (0, 0, 250)]):
        Image.new("RGB", (32, 32), colour).save(folder / f"{number}.png")
    words = ["--pretrained", own_checkpoint(tmp_path / "own.pth.tar"), "--images", folder, "--k", 1]
    about = run(tmp_path / "out", *words, "--duplicate_similarity", 0.9999)
    assert about["duplicate_groups"] == 1
    said = capsys.readouterr().out
    assert "duplicates.csv: 1 group; " in said and "3 images in 1 cluster of 3 to 3." in said


def test_what_nobody_uses_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbone = build_backbone("conv4w4")
    state = {**backbone.state_dict(), "fc.weight": torch.zeros(7, backbone.feature_dim), "fc.bias": torch.zeros(7)}
    torch.save(state, tmp_path / "plain.pth")
    run(tmp_path / "out", "--pretrained", tmp_path / "plain.pth", "--images", "synthetic:20", "--arch", "conv4w4")
    assert "plain.pth: left aside, not part of the backbone: fc (2 tensors)" in capsys.readouterr().out


def test_any_number_of_clusters_by_k_means(tmp_path: Path) -> None:
    """On gratings of four kinds even a random network tells the kinds apart."""
    checkpoint = own_checkpoint(tmp_path / "own.pth.tar")
    words = ["--pretrained", checkpoint, "--images", "synthetic:200:32x32:4", "--k", 4]
    about = run(tmp_path / "out", *words)
    rows = rows_of(tmp_path / "out" / "labels.csv")
    clusters, classes = [int(row["cluster"]) for row in rows], open_source("synthetic:200:32x32:4").labels
    assert metrics.adjusted_rand_score(classes, clusters) > 0.9
    assert about["hungarian_accuracy"] > 95 and about["clusters"] == "k-means, 4 of backbone features"
    assert all(0 < float(row["second_confidence"]) <= float(row["confidence"]) < 1 for row in rows)
    features = np.load(tmp_path / "out" / "features" / "features.npy")
    centres = np.stack([features[np.array(clusters) == cluster].mean(0) for cluster in range(4)])
    assert np.argmax(features @ (centres / np.linalg.norm(centres, axis=1, keepdims=True)).T, 1).tolist() == clusters
    page = " ".join(page_of(tmp_path / "out" / "clusters.html").texts)
    assert f"Hungarian accuracy {about['hungarian_accuracy']:.1f} %" in page
    again = run(tmp_path / "out", *words[:-1], 9)
    assert again["clusters_used"] == 9, "the features of the first pass serve again"


def test_a_network_without_clusters_gets_k_means(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = torch.load(own_checkpoint(tmp_path / "own.pth.tar"), weights_only=True)
    trunk = {name: x for name, x in kept["state_dict"].items() if "prototypes" not in name and "projection" not in name}
    torch.save({"state_dict": trunk}, tmp_path / "trunk.pth")
    words = ["--pretrained", tmp_path / "trunk.pth", "--images", "synthetic:50", "--arch", "conv4w8"]
    about = run(tmp_path / "out", *words, "--image_size", 32)
    assert about["clusters"] == "k-means, 5 of backbone features"
    assert "--k says another number" in capsys.readouterr().out


def test_embeddings_as_features(tmp_path: Path) -> None:
    words = ["--pretrained", own_checkpoint(tmp_path / "own.pth.tar"), "--images", "synthetic:30", "--k", 3]
    assert run(tmp_path / "out", *words, "--use_mlp")["features"] == "embedding"
    assert np.load(tmp_path / "out" / "features" / "features.npy").shape == (30, 8)


def test_links_duplicates_outliers_and_near(tmp_path: Path, photos: Path) -> None:
    out, copy = tmp_path / "out", photos / "copy of 5.jpg"
    words = ["--pretrained", own_checkpoint(tmp_path / "own.pth.tar"), "--images", photos, "--near", copy, "--links"]
    run(out, *words)
    for row in rows_of(out / "labels.csv"):
        (link,) = (out / "clusters").glob(f"*/{Path(row['path']).name}")
        assert link.parent.name == row["cluster"].zfill(len(link.parent.name)) and link.samefile(row["path"])
    pairs = [Path(row["path"]).name for row in rows_of(out / "duplicates.csv") if row["group"]]
    assert {"005.png", "copy of 5.jpg"} <= set(pairs)
    near = rows_of(out / "near.csv")
    assert near[0]["rank"] == "1" and Path(near[0]["path"]).name == "005.png" and len(near) == 24
    assert "copy of 5.jpg" not in {Path(row["path"]).name for row in near}, "nothing is its own neighbour"
    for name in ("clusters.html", "near.html"):
        assert page_of(out / name).count("img") > 1
    before = sorted(path.name for path in (out / "clusters").glob("*/*"))
    run(out, *words, "--k", 2)
    assert sorted(path.name for path in (out / "clusters").glob("*/*")) == before
    assert len(list((out / "clusters").iterdir())) == 2, "links of the first labelling are gone"


def test_copies_of_the_picture_asked_about_are_left_out(tmp_path: Path) -> None:
    images = tmp_path / "images"
    (images / "more").mkdir(parents=True)
    source = open_source("digits", split="val")
    for i in range(8):
        Image.fromarray(source.load(i).permute(1, 2, 0).numpy()).save(images / f"{i}.png")
    asked = shutil.copy(images / "3.png", tmp_path / "asked.png")
    for name in ("a.png", "b.png"):
        shutil.copy(asked, images / "more" / name)
    words = ["--pretrained", own_checkpoint(tmp_path / "own.pth.tar"), "--images", images, "--k", 2, "--near", asked]
    run(tmp_path / "out", *words, "--near_count", 5)
    names = [Path(row["path"]).name for row in rows_of(tmp_path / "out" / "near.csv")]
    assert len(names) == 5 and not {"3.png", "a.png", "b.png"} & set(names)
    assert "asked.png, asked about" in page_of(tmp_path / "out" / "near.html").texts
    for i in range(8):
        (images / f"{i}.png").unlink()
    run(tmp_path / "copies", *words)
    assert rows_of(tmp_path / "copies" / "near.csv") == []
    assert "There is no other image." in page_of(tmp_path / "copies" / "near.html").texts


def test_a_killed_labelling_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = own_checkpoint(tmp_path / "own.pth.tar")
    words = ["--pretrained", checkpoint, "--images", "synthetic:100", "--batch_size", 10]
    run(tmp_path / "whole", *words)
    read, whole = list[int](), Reader.forward

    def dies_in_the_middle(self: Reader, images: torch.Tensor) -> object:
        read.append(len(images))
        if len(read) == 5:
            raise KeyboardInterrupt
        return whole(self, images)

    monkeypatch.setattr(scanning, "_SECONDS_BETWEEN_MARKS", 0)
    monkeypatch.setattr(Reader, "forward", dies_in_the_middle)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", *words)
    mark = json.loads((tmp_path / "out" / "features" / "progress.json").read_text())
    assert mark["done"] == 40 and not (tmp_path / "out" / "labels.csv").exists()
    with (tmp_path / "out" / "features" / "clusters.npy").open("r+b") as file:
        file.seek(-16 * 60, 2)
        file.write(b"\xff" * 32)  # half a batch that a kill left behind the mark
    run(tmp_path / "out", *words)
    assert sum(read) == 50 + 60
    for name in ("labels.csv", "features/features.npy", "duplicates.csv", "assign.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_bad_input(tmp_path: Path, photos: Path) -> None:
    own, empty, text = own_checkpoint(tmp_path / "own.pth.tar"), tmp_path / "empty", tmp_path / "a.txt.png"
    empty.mkdir()
    text.write_text("no image")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    good = ["--pretrained", own, "--images", "synthetic:20"]
    for out, words, message in (
        ("out", ["--images", photos], "--pretrained: name the checkpoint"),
        ("out", ["--pretrained", own], "--images: name the folder"),
        ("out", ["--pretrained", own, "--images", empty], "empty is empty"),
        ("out", ["--pretrained", own, "--images", tmp_path / "none"], "does not exist"),
        ("out", ["--pretrained", tmp_path / "none.pth", "--images", photos], "none.pth: no such checkpoint"),
        ("out", ["--pretrained", empty, "--images", photos], "a folder without checkpoint.pth.tar or"),
        ("out", [*good, "--k", 21], "--k 21: there are only 20 images"),
        ("out", [*good, "--k", -1], "--k -1"),
        ("out", [*good, "--cls_num", 3], "heads 0 to 0"),
        ("out", [*good, "--near", text], "--near .*a.txt.png: not an image"),
        ("out", [*good, "--links"], "--links: synthetic/train/0 is no file"),
        ("full", good, "holds other files and no labelling"),
        (photos / "inside", ["--pretrained", own, "--images", photos], "lies inside --images"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            run(tmp_path / out, *words)
        assert len(str(caught.value).splitlines()) == 1
        assert out == "full" or not (tmp_path / out).exists(), "nothing is made before the input is checked"


def test_another_labelling_is_not_mixed_in(tmp_path: Path) -> None:
    words = ["--pretrained", own_checkpoint(tmp_path / "own.pth.tar"), "--images", "synthetic:20"]
    run(tmp_path / "out", *words)
    for more, difference in ((["--images", "synthetic:21"], "the images"), (["--temperature", 1], "temperature")):
        with pytest.raises(UserError, match=f"holds another labelling.*{difference}"):
            run(tmp_path / "out", *words, *more)
    own = own_checkpoint(tmp_path / "wider.pth.tar", arch="conv4w16")
    with pytest.raises(UserError, match="the network's weights"):
        run(tmp_path / "out", *words, "--pretrained", own)
    (tmp_path / "out" / "features" / "progress.json").write_text("{")
    with pytest.raises(UserError, match=r"progress.json: damaged"):
        run(tmp_path / "out", *words)


def test_nothing_but_broken_files(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"no")
    shutil.copy(tmp_path / "images" / "a.jpg", tmp_path / "images" / "b.png")
    with pytest.raises(UserError, match="unreadable images in a row"):
        run(tmp_path / "out", "--pretrained", own_checkpoint(tmp_path / "own.pth.tar"), "--images", tmp_path / "images")
