"""Galleries and maps of a run's own images, for its report."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.decomposition import PCA

from clusterssl.data import open_source
from clusterssl.labelling import sample
from clusterssl.labelling.clusters import Labels
from clusterssl.labelling.pages import Clusters
from clusterssl.labelling.sample import galleries_of, run_galleries
from clusterssl.report import Strip, write_report
from tests.evals.checkpoints import own_checkpoint
from tests.report.runs import write_run
from tests.report.test_page import ROOT, page_of


def test_a_report_shows_the_clusters_of_its_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    own_checkpoint(run / "checkpoint.pth.tar")
    command = [sys.executable, str(ROOT / "report.py"), str(run)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = page_of(run / "report.html")
    text = " ".join(page.texts)
    for part in ("Largest clusters", "Smallest clusters", "Purest clusters", "Most confused clusters", "t-SNE", "PCA"):
        assert part in text, part
    assert 15 < page.count("img") <= 4 * 6 + 2
    assert (run / "report.html").stat().st_size < 5_000_000


def test_purity_by_hand() -> None:
    source = open_source("digits")
    positions = np.arange(60)
    clusters = np.arange(60) % 4
    confidence = np.linspace(0.2, 0.9, 60, dtype=np.float32)
    made = Clusters(Labels("", 0, positions, clusters, confidence, clusters, confidence), source)
    expected = [max(np.mean(source.labels[:60][clusters == c] == label) for label in range(10)) for c in range(4)]
    assert made.purity() == pytest.approx(expected)
    source.labels = np.full(len(source), -1)
    assert made.purity() is None


def test_pca_is_that_of_scikit_learn() -> None:
    rows = np.random.default_rng(0).normal(size=(900, 7)).astype(np.float32) * np.arange(1, 8)
    found, expected = sample._pca(rows), PCA(2).fit_transform(rows[::3])
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-3)


def test_what_was_read_in_time_is_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    own_checkpoint(run / "checkpoint.pth.tar")
    found = run_galleries(run, seconds=0)
    assert {gallery.note.split(" images")[0] for gallery in found if gallery.choice} == {"Of 50"}


def test_several_runs_share_the_room_on_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [write_run(tmp_path / name) for name in ("a", "b")]
    for run in runs:
        own_checkpoint(run / "checkpoint.pth.tar")
    whole = {run: run_galleries(run) for run in runs}
    monkeypatch.setattr(sample, "run_galleries", whole.__getitem__)

    def shown(most_bytes: int) -> list[tuple[str, bool]]:
        return [(gallery.run.name, gallery.choice) for gallery in galleries_of(runs, most_bytes) if gallery.run]

    clusters, maps = [True] * 4, [False]
    first, second = (sum(len(strip[2]) for gallery in whole[run] for strip in gallery.strips) for run in runs)
    assert shown(first + second) == [(name, kind) for name in "ab" for kind in clusters + maps]
    assert shown(first + second - 1) == [("a", kind) for kind in clusters + maps] + [("b", kind) for kind in clusters]
    assert shown(first) == [("a", kind) for kind in clusters + maps]
    out = tmp_path / "both.html"
    command = [sys.executable, str(ROOT / "report.py"), *map(str, runs), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    titles = [f"{run}: {part} clusters" for run in "ab" for part in ("Largest", "Smallest", "Purest", "Most confused")]
    assert set(titles) <= set(page_of(out).texts) and out.stat().st_size < 5_000_000


def test_of_equally_pure_clusters_the_largest_come_first(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    own_checkpoint(run / "checkpoint.pth.tar")
    for gallery in run_galleries(run):
        if gallery.title in ("Purest clusters", "Most confused clusters"):
            sign = -1 if gallery.title.startswith("Purest") else 1
            rows = [(sign * strip[4], -strip[3]) for strip in gallery.strips if isinstance(strip, Strip)]
            assert rows == sorted(rows) and len(rows) == 6


def test_images_without_classes_are_ranked_by_confidence_and_that_is_said(tmp_path: Path) -> None:
    run, photos = write_run(tmp_path / "run"), tmp_path / "photos"
    own_checkpoint(run / "checkpoint.pth.tar")
    photos.mkdir()
    source = open_source("digits", split="val")
    for i in range(60):
        Image.fromarray(source.load(i).permute(1, 2, 0).numpy()).save(photos / f"{i:02}.png")
    about = json.loads((run / "run.json").read_text())
    about["config"]["data_path"] = str(photos)
    (run / "run.json").write_text(json.dumps(about))
    found = {gallery.title: gallery for gallery in run_galleries(run)}
    assert {"Surest clusters", "Most doubtful clusters"} < set(found) and "Purest clusters" not in found
    assert "By mean confidence" in found["Surest clusters"].note
    told = [float(strip[0].split("confidence ")[1]) for strip in found["Surest clusters"].strips]
    assert told == sorted(told, reverse=True) and len(told) == 6
    strips = [strip for gallery in found.values() for strip in gallery.strips]
    assert all(isinstance(strip, Strip) and strip.purity is None for strip in strips)
    largest = found["Largest clusters"]
    assert largest.largest == largest.strips[0][3] / 60
    write_report([run], tmp_path / "page.html", galleries=[replace(largest, largest=0.9)])
    page = page_of(tmp_path / "page.html")
    assert "One cluster holds 90% of the images" in " ".join(page.texts)
    asked = {attributes.get("id") for tag, attributes in page.tags if tag == "input"}
    assert "images" in asked and not {"purest", "impurest"} & asked


def test_nothing_without_checkpoint_or_images(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert run_galleries(run) == []
    own_checkpoint(run / "checkpoint.pth.tar")
    about = json.loads((run / "run.json").read_text())
    about["config"]["data_path"] = str(tmp_path / "gone")
    (run / "run.json").write_text(json.dumps(about))
    assert run_galleries(run) == []
    assert run_galleries(tmp_path) == []
