"""Superclasses: the counts of the published table, matching by name and by number, own files."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from clusterssl.errors import UserError
from clusterssl.evals.hierarchy import NAMES, open_hierarchy, read_table

WORDNET = json.loads(
    (Path(__file__).parents[2] / "src" / "clusterssl" / "evals" / "superclasses.json").read_text(encoding="utf-8")
)["classes"]
COUNTS = {
    "0": (1, 890), "1": (2, 890), "2": (10, 890), "3": (29, 890), "4": (128, 890), "5": (466, 887), "6": (591, 616),
    "7": (98, 98), "8": (3, 3), "entity13": (13, 771), "entity30": (30, 639), "living17": (17, 223),
    "nonliving26": (26, 157),
}  # fmt: skip
"""superclasses, and ImageNet classes under them"""


def imagenet() -> list[str]:
    """1000 class names, WordNet ids where they are in the tree."""
    known = dict(WORDNET)
    return [known.get(number, f"x{number}") for number in range(1000)]


@pytest.mark.parametrize("name", NAMES)
def test_published_counts(name: str) -> None:
    found = open_hierarchy(name, imagenet())
    assert (len(found.names), int((found.of_C >= 0).sum())) == COUNTS[name]
    assert len(set(found.names)) == len(found.names)
    by_number = open_hierarchy(name, [f"class {i}" for i in range(1000)])
    assert np.array_equal(by_number.of_C, found.of_C)


def test_levels_are_nested() -> None:
    levels = [open_hierarchy(str(level), imagenet()).of_C for level in range(6)]
    for coarse, fine in itertools.pairwise(levels):
        for superclass in range(fine.max() + 1):
            assert len(set(coarse[fine == superclass])) == 1


def test_some_classes_of_imagenet_by_name() -> None:
    classes = ["n01440764", "n02123045", "n99999999", "n03930630"]  # tench, tabby, none, pickup
    found = open_hierarchy("1", classes)
    assert [found.names[i] if i >= 0 else "" for i in found.of_C] == [
        "living thing",
        "living thing",
        "",
        found.names[1],
    ]
    assert found.of_C.tolist() == [0, 0, -1, 1]
    breeds = open_hierarchy("living17", classes)
    assert breeds.names == ["domestic cat"] and breeds.of_C.tolist() == [-1, 0, -1, -1]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '{"animal": ["ant", "bee"], "thing": ["cup"]}'),
        ("b.json", '{"ant": "animal", "bee": "animal", "cup": "thing"}'),
        ("c.txt", "ant\tanimal\nbee\tanimal\n\ncup\tthing\n"),
        ("d.txt", "ant animal\nbee  animal\r\ncup thing"),
    ],
)
def test_files(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    found = open_hierarchy(str(tmp_path / name), ["ant", "bee", "cup", "dog"])
    assert found.names == ["animal", "thing"] and found.of_C.tolist() == [0, 0, 1, -1]
    assert open_hierarchy(str(tmp_path / name), ["cup"]).of_C.tolist() == [0]


def test_names_with_spaces(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("sea snail\tsoft animal\n")
    assert read_table(str(tmp_path / "t.txt")) == {"sea snail": "soft animal"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("9", None, "neither one of 0 to 8, entity13, .* nor a readable file"),
        ("x.json", "[1]", "expected .*superclass"),
        ("x.json", "{", "nor a readable file"),
        ("x.txt", "ant\n", "line 1 has no superclass: ant"),
        ("x.txt", "ant a\nant b\n", "ant is in a and in b"),
        ("x.txt", "cow a\n", r"holds none of these classes \(first: ant\)"),
        ("entity13", None, "named by WordNet id"),
    ],
)
def test_what_does_not_fit(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
        name = str(tmp_path / name)
    with pytest.raises(UserError, match=message):
        open_hierarchy(name, ["ant", "bee"])
