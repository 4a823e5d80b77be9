"""Superclasses: WordNet levels and BREEDS sets of ImageNet's classes, or any table of a file.

Santurkar et al. 2021 (BREEDS, https://arxiv.org/abs/2008.04859), used as in Amrani et al. 2022, table 3: a superclass
holds all classes below its node, not a balanced choice of them. 890 of ImageNet's 1000 classes are in that tree.

Legend of suffixes: C classes.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from clusterssl.errors import UserError
from clusterssl.files import first_line

NAMES = (*map(str, range(9)), "entity13", "entity30", "living17", "nonliving26")
_IMAGENET_CLASSES = 1000


class Hierarchy(NamedTuple):
    """Which superclass every class belongs to."""

    title: str
    names: list[str]
    """of the superclasses that have classes here"""
    of_C: NDArray[np.int64]
    """[C] positions in `names`; -1 for a class without superclass"""


def open_hierarchy(name: str, classes: Sequence[str]) -> Hierarchy:
    """Superclasses by name or file.

    Args:
        name: a WordNet level "0" (the root) to "8", "entity13", "entity30", "living17" or "nonliving26", for classes
            named by WordNet id (n01440764) or all 1000 in ImageNet's order; else a file, see `read_table`.
        classes: names of the classes, in the order of their numbers.

    Raises:
        UserError: neither a known name nor a readable file, or no class of it is here.
    """
    table = _imagenet_table(name, classes) if name in NAMES else read_table(name)
    numbers = {superclass: number for number, superclass in enumerate(dict.fromkeys(table.values()))}
    of_C = np.array([numbers.get(table.get(name_of_class, ""), -1) for name_of_class in classes], dtype=np.int64)
    present = np.unique(of_C[of_C >= 0])
    if not len(present):
        raise UserError(
            f"--superclass {name}: holds none of these classes (first: {classes[0]}); the built-in sets need folders "
            "named by WordNet id, like n01440764, others a file of lines: class, tab, superclass"
        )
    names = list(numbers)
    return Hierarchy(name, [names[i] for i in present], np.where(of_C >= 0, np.searchsorted(present, of_C), -1))


def read_table(path: str) -> dict[str, str]:
    """From class to superclass, of a file.

    Either JSON, {"superclass": ["class", ...]} or {"class": "superclass"}; or lines of class, tab (or spaces),
    superclass.

    Raises:
        UserError: unreadable, of another form, or a class in two superclasses.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        pairs = _pairs_of_json(json.loads(text)) if path.endswith(".json") else _pairs_of_lines(text)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        known = f"{NAMES[0]} to {NAMES[8]}, {', '.join(NAMES[9:])}"
        raise UserError(f"--superclass {path}: neither one of {known} nor a readable file ({reason})") from error
    table: dict[str, str] = {}
    for name, superclass in pairs:
        if table.setdefault(name, superclass) != superclass:
            raise UserError(f"--superclass {path}: {name} is in {table[name]} and in {superclass}; keep it in one")
    return table


def _pairs_of_json(content: Any) -> list[tuple[str, str]]:
    if not isinstance(content, dict) or not all(isinstance(value, (str, list)) for value in content.values()):
        raise ValueError('expected {"superclass": ["class", ...]} or {"class": "superclass"}')
    pairs: list[tuple[str, str]] = []
    for key, value in content.items():
        pairs += [(key, value)] if isinstance(value, str) else [(str(name), key) for name in value]
    return pairs


def _pairs_of_lines(text: str) -> list[tuple[str, str]]:
    pairs = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            words = [word.strip() for word in line.strip().split("\t" if "\t" in line.strip() else None, 1)]
            if len(words) < 2:
                raise ValueError(f"line {number} has no superclass: {line.strip()[:40]}")
            pairs.append((words[0], words[1]))
    return pairs


def _imagenet_table(name: str, classes: Sequence[str]) -> dict[str, str]:
    facts = _facts()
    wordnet = dict(facts["classes"])
    by_number = len(classes) == _IMAGENET_CLASSES and not set(classes) & set(wordnet.values())
    named = {number: classes[number] for number in wordnet} if by_number else wordnet
    short = Counter(title.split(",")[0] for _, title, _ in facts["sets"][name])
    table: dict[str, str] = {}
    for identity, title, members in facts["sets"][name]:
        first = title.split(",")[0]
        superclass = first if short[first] == 1 else f"{first} ({identity})"
        table |= {named[number]: superclass for number in members}
    return table


@functools.cache
def _facts() -> dict[str, Any]:
    text = resources.files("clusterssl.evals").joinpath("superclasses.json").read_text(encoding="utf-8")
    facts: dict[str, Any] = json.loads(text)
    return facts
