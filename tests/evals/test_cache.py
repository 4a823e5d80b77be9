"""Kept features: the same numbers, once; other networks, images and crops apart; kills and damage without a trace."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from clusterssl.data import Source, open_source
from clusterssl.errors import UserError
from clusterssl.evals import cache
from clusterssl.evals.cache import Extraction
from clusterssl.evals.features import extract
from clusterssl.evals.keeping import Features
from tests.ranks import run_ranks


class Net(nn.Module):
    """A small network of fixed weights that counts its images."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(5, 3, 3, 3, generator=generator), requires_grad=False)
        self.seen = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen += len(images)
        return torch.conv2d(images, self.weight).mean((2, 3))


def extraction(folder: Path | str, net: Net | None = None, **more: Any) -> Extraction:
    return Extraction(net or Net(), **{"image_size": (16, 16), "batch_size": 8, "folder": str(folder), **more})


def synthetic(count: int = 41, split: str = "train") -> Source:
    return open_source(f"synthetic:{count}:16x16:3", split=split)


def same(a: Features, b: Features) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def photos(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    for label, name in enumerate(("ant", "bee")):
        (folder / name).mkdir(parents=True)
        for i in range(5):
            Image.fromarray(rng.integers(0, 255, (20, 24 + label, 3)).astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


def test_read_again_they_are_what_was_computed(tmp_path: Path) -> None:
    net, source = Net(), synthetic()
    expected, labels = extract(Net(), source, image_size=(16, 16), batch_size=8)
    first = extraction(tmp_path / "new" / "folder", net).of(source, "train")
    seen = net.seen
    again = extraction(tmp_path / "new" / "folder", net).of(source, "train")
    assert net.seen == seen >= 41
    for found in (first, again, extraction("", net).of(source, "train")):
        assert same(found, Features(expected, labels, torch.arange(41)))
    assert not list((tmp_path / "new" / "folder").glob(".*"))


def test_rows_are_memory_mapped(tmp_path: Path) -> None:
    rows = extraction(tmp_path).of(synthetic(), "train").rows
    (path,) = tmp_path.glob("*.npy")
    np.load(path, mmap_mode="r+")[7] = 5.0
    assert rows[7].tolist() == [5.0] * 5


def test_what_changes_the_features_changes_the_entry(tmp_path: Path) -> None:
    source = synthetic()
    extraction(tmp_path).of(source, "train")
    for other, images in (
        (extraction(tmp_path, Net(1)), source),
        (extraction(tmp_path, image_size=(12, 12)), source),
        (extraction(tmp_path, part="embedding"), source),
        (extraction(tmp_path, resize=20), source),
        (extraction(tmp_path), synthetic(40)),
        (extraction(tmp_path), synthetic(split="val")),
    ):
        entries = len(list(tmp_path.glob("*.json")))
        found = other.of(images, "x")
        assert len(list(tmp_path.glob("*.json"))) == entries + 1
        expected, _ = extract(
            other.network, images, image_size=other.image_size, resize=other.resize, batch_size=8
        )  # fmt: skip
        assert torch.equal(found.rows, expected)


def test_train_and_val_of_equal_names_are_apart(tmp_path: Path) -> None:
    """CIFAR folders number their images from 0 in every class of both."""
    one, two = (photos(tmp_path / name) for name in ("train", "val"))
    Image.new("RGB", (20, 20), (9, 9, 9)).save(two / "ant" / "0.png")
    found = [extraction(tmp_path / "cache").of(open_source(str(folder)), "x").rows for folder in (one, two)]
    assert not torch.equal(*found)


def test_labels_are_those_of_the_source(tmp_path: Path) -> None:
    source = synthetic()
    extraction(tmp_path).of(source, "train")
    source.labels = source.labels[::-1].copy()
    assert extraction(tmp_path).of(source, "train").labels.tolist() == source.labels.tolist()


def test_unreadable_images_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = photos(tmp_path / "photos")
    whole = extraction("").of(open_source(str(folder)), "x")
    for name in ("ant/1.png", "bee/4.png"):
        (folder / name).write_bytes(b"no image")
    for kept in ("", tmp_path / "cache", tmp_path / "cache"):
        found = extraction(kept, batch_size=3).of(open_source(str(folder)), "x")
        assert found.positions.tolist() == [0, 2, 3, 4, 5, 6, 7, 8]
        assert found.labels.tolist() == [0] * 4 + [1] * 4
        assert torch.allclose(found.rows, whole.rows[found.positions], atol=1e-6)
    some = extraction(tmp_path / "cache").of(open_source(str(folder)), "x", np.array([1, 2, 9]))
    assert some.positions.tolist() == [2]


@pytest.mark.parametrize("whole_first", [True, False])
def test_a_part_of_the_images(tmp_path: Path, whole_first: bool) -> None:
    source, chosen, net = synthetic(), np.array([2, 3, 30]), Net()
    whole = extraction(tmp_path / "w").of(source, "train")
    if whole_first:
        extraction(tmp_path, net).of(source, "train")
    before = net.seen
    for _ in range(2):
        part = extraction(tmp_path, net).of(source, "train", chosen)
        assert torch.allclose(part.rows, whole.rows[chosen], atol=1e-6)
        assert part.labels.tolist() == source.labels[chosen].tolist() and part.positions.tolist() == chosen.tolist()
    assert net.seen - before == (0 if whole_first else 4)  # one blank image tells the shape


def test_a_killed_write_and_a_torn_file_are_computed_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = synthetic()
    expected = extraction("").of(source, "train")

    class Killed(Net):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if self.seen > 20:
                raise KeyboardInterrupt
            return super().forward(images)

    with pytest.raises(KeyboardInterrupt):
        extraction(tmp_path, Killed()).of(source, "train")
    assert not list(tmp_path.iterdir())
    assert same(extraction(tmp_path).of(source, "train"), expected)
    (rows,) = tmp_path.glob("[!.]*.npy")
    rows.write_bytes(rows.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING, "clusterssl"):
        assert same(extraction(tmp_path).of(source, "train"), expected)
    assert "damaged" in caplog.text
    rows.with_suffix(".json").write_text("{")
    assert same(extraction(tmp_path).of(source, "train"), expected)
    assert json.loads(rows.with_suffix(".json").read_text())["facts"]["images"] == 41


def test_what_is_too_much_for_memory_goes_to_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = synthetic()
    expected = extraction("").of(source, "train")
    for held, files in ((41 * 5 * 4, 0), (41 * 5 * 4 - 1, 2)):
        monkeypatch.setattr(cache, "HELD", held)
        assert same(extraction("", spill=str(tmp_path / "spill")).of(source, "train"), expected)
        assert len(list(tmp_path.glob("spill/*"))) == files
    monkeypatch.setattr(cache, "HELD", 41 * 5 * 4)
    assert extraction("", spill=str(tmp_path), ten_crops=True).of(source, "train").rows.shape == (41, 10, 5)
    assert len(list(tmp_path.glob("*.npy"))) == 1


@pytest.mark.parametrize("ten_crops", [False, True])
def test_batch_by_batch_they_are_the_same(tmp_path: Path, ten_crops: bool) -> None:
    folder = photos(tmp_path)
    if not ten_crops:  # which refuse unreadable images
        (folder / "bee" / "1.png").write_bytes(b"no image")
    made, source = extraction("", batch_size=3, ten_crops=ten_crops), open_source(str(folder))
    rows, labels = (torch.cat(parts) for parts in zip(*made.stream(source, "x"), strict=True))
    expected = made.own(source, "x")
    assert len(rows) == (10 if ten_crops else 9) and torch.equal(labels, expected[1])
    assert torch.equal(rows, expected[0])


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--cache_features"):
        extraction(tmp_path / "file").of(synthetic(), "train")


def on_a_rank(rank: int, world_size: int, folder: str) -> list[Any]:
    found = []
    for count, kept in ((41, folder), (5, folder), (41, ""), (41, folder)):
        features = extraction(kept).of(synthetic(count), "train")
        own, labels = extraction(kept).own(synthetic(count), "train")
        streamed = [len(rows) for rows, _ in extraction("").stream(synthetic(count), "train")]
        assert sum(streamed) == (len(own) if not kept else sum(streamed))
        found.append(([part.clone() for part in features], len(own), len(labels)))
    photos_folder = Path(folder).parent / "photos"
    found.append(
        ([part.clone() for part in extraction(folder, batch_size=2).of(open_source(str(photos_folder)), "x")], 0, 0)
    )
    return found


def test_two_ranks_write_what_one_writes(tmp_path: Path) -> None:
    (photos(tmp_path / "photos") / "bee" / "3.png").write_bytes(b"no image")
    alone = on_a_rank(0, 1, str(tmp_path / "1"))
    both = run_ranks(on_a_rank, 2, str(tmp_path / "2"))
    for number, (parts, rows, _) in enumerate(alone):
        assert rows == sum(found[number][1] for found in both) == sum(found[number][2] for found in both)
        for found in both:
            assert all(torch.equal(a, b) for a, b in zip(found[number][0], parts, strict=True))
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "12"]
    assert files[0] == files[1] and len(files[0]) == 6


def test_the_hash_sees_names_and_pixels(tmp_path: Path) -> None:
    one = photos(tmp_path / "a")
    before = cache.data_hash(open_source(str(one)))
    assert cache.data_hash(open_source(str(photos(tmp_path / "b")))) == before
    Image.new("RGB", (24, 20)).save(one / "ant" / "0.png")
    assert cache.data_hash(open_source(str(one))) != before


def test_what_killed_processes_left_is_swept_an_hour_later(tmp_path: Path) -> None:
    old, young, foreign = tmp_path / f".{'a1' * 12}.77.tmp", tmp_path / f".{'b2' * 12}.78.tmp", tmp_path / ".mine.tmp"
    for path in (old, young, foreign):
        path.write_bytes(b"torn")
    for path in (old, foreign):
        os.utime(path, (time.time() - 4000,) * 2)
    extraction(tmp_path).of(synthetic(), "train")
    assert not old.exists() and young.exists() and foreign.exists()
