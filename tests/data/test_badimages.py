"""The ledger of unreadable images."""

from __future__ import annotations

from pathlib import Path

import pytest

from clusterssl.data import BadImages, open_source
from clusterssl.errors import UserError


def test_each_image_once(tree: Path, tmp_path: Path) -> None:
    source = open_source(str(tree))
    ledger = BadImages(source, tmp_path / "run" / "bad_images.txt", max_bad_fraction=0.5)
    assert ledger.count == 0 and not (tmp_path / "run").exists()
    ledger.add([(3, "empty file"), (3, "empty file")])
    ledger.add([(3, "empty file"), (5, "truncated\nhere")])
    ledger.add([])
    assert ledger.count == 2 and ledger.fraction == 2 / 12
    lines = (tmp_path / "run" / "bad_images.txt").read_text().splitlines()
    assert lines == [f"{source.name(3)}\tempty file", f"{source.name(5)}\ttruncated\\nhere"]


def test_restarts_and_other_ranks_are_counted(tree: Path, tmp_path: Path) -> None:
    source, path = open_source(str(tree)), tmp_path / "bad_images.txt"
    first = BadImages(source, path, max_bad_fraction=0.5)
    first.add([(3, "a")])
    second = BadImages(source, path, max_bad_fraction=0.5)
    assert second.count == 1
    second.add([(3, "a"), (4, "b")])
    first.add([(4, "b"), (7, "c")])
    assert first.count == 3 and len(path.read_text().splitlines()) == 3


def test_too_many(tree: Path, tmp_path: Path) -> None:
    source = open_source(str(tree))
    ledger = BadImages(source, tmp_path / "bad_images.txt", max_bad_fraction=0.1)
    ledger.add([(3, "a")])
    with pytest.raises(UserError, match=r"2 of 12 images cannot be read, listed in .*--max_bad_fraction \(0.1\)") as e:
        ledger.add([(4, "empty file")])
    assert source.name(4) in str(e.value) and "\n" not in str(e.value)
    assert len((tmp_path / "bad_images.txt").read_text().splitlines()) == 2
    with pytest.raises(UserError):
        BadImages(source, max_bad_fraction=0).add([(0, "a")])


def test_an_unwritable_list_does_not_end_the_run(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "bad_images.txt").mkdir()
    ledger = BadImages(open_source(str(tree)), tmp_path / "bad_images.txt", max_bad_fraction=0.5)
    ledger.add([(3, "a")])
    assert ledger.count == 1


def test_without_a_file(tree: Path) -> None:
    ledger = BadImages(open_source(str(tree)), max_bad_fraction=1.0)
    ledger.add([(i, "a") for i in range(12)])
    assert ledger.fraction == 1.0
