"""Ground truth of instance retrieval: the original Oxford and Paris folders, and gnd_*.pkl or .json files.

Pickles are read without executing anything: what is not plain data or a numeric array is refused.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np

from clusterssl.errors import UserError
from clusterssl.files import first_line

LEVELS: dict[str, dict[str, tuple[str, ...]]] = {
    "revisited": {"easy": ("easy",), "medium": ("easy", "hard"), "hard": ("hard",)},
    "original": {"all": ("ok",)},
}
"""which sets of images are positive; the others are skipped in the list (Radenovic et al. 2018, section 3.3)"""

BROKEN = frozenset(
    f"paris_{place}_{number:06}"
    for place, numbers in {
        "louvre": (136, 146), "moulinrouge": (422,), "museedorsay": (1059,), "notredame": (188,),
        "pantheon": (284, 960, 974), "pompidou": (195, 196, 201, 467, 640), "sacrecoeur": (299, 330, 353),
        "triomphe": (662, 833, 863, 867),
    }.items()
    for number in numbers
)  # fmt: skip
"""damaged images of Paris6k, which are not part of the database"""


@dataclass(frozen=True)
class Query:
    """One query image, the part of it that is looked for, and which database images show the same."""

    name: str
    box: tuple[float, float, float, float] | None
    """left, top, right, bottom in pixels; None: the whole image"""
    sets: Mapping[str, tuple[int, ...]]
    """database positions by set: easy, hard, junk; or ok, junk"""


@dataclass(frozen=True)
class GroundTruth:
    """Database images by name, and queries."""

    names: list[str]
    queries: list[Query]
    protocol: str
    """key of `LEVELS`"""

    def positives(self, level: str) -> list[tuple[np.ndarray, np.ndarray]]:
        """Positions of the positive and of the skipped images of every query, int64."""
        wanted = LEVELS[self.protocol][level]
        found = []
        for query in self.queries:
            sides: tuple[list[int], list[int]] = ([], [])
            for key, positions in query.sets.items():
                sides[key not in wanted].extend(positions)
            found.append((np.array(sides[0], dtype=np.int64), np.array(sides[1], dtype=np.int64)))
        return found


def read_ground_truth(path: Path) -> GroundTruth:
    """Reads gnd_*.pkl or .json: imlist, qimlist, and gnd with {"bbx", "easy", "hard", "junk"} or {"bbx", "ok", "junk"}.

    Raises:
        UserError: unreadable, holds code, is of another form, or names no query or image.
    """
    content = _json(path) if path.suffix == ".json" else read_plain_pickle(path)
    try:
        names, queries = [str(name) for name in content["imlist"]], [str(name) for name in content["qimlist"]]
        entries = [{key: _numbers(value) for key, value in entry.items()} for entry in content["gnd"]]
        protocol = "original" if all("ok" in entry for entry in entries) else "revisited"
        keys = {key for wanted in LEVELS[protocol].values() for key in wanted} | {"junk"}
        made = [
            Query(
                name, _box(entry.get("bbx")), {key: tuple(int(i) for i in entry.get(key, ())) for key in sorted(keys)}
            )
            for name, entry in zip(queries, entries, strict=True)
        ]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{path}: no ground truth of retrieval; expected imlist, qimlist and gnd with bbx, easy, hard and junk or "
            f"ok and junk ({type(error).__name__}: {first_line(error)})"
        ) from error
    return _checked(GroundTruth(names, made, protocol), path)


def _numbers(values: Any) -> list[float]:
    return [] if values is None else [float(value) for value in values]


def _box(values: Sequence[float] | None) -> tuple[float, float, float, float] | None:
    if not values:
        return None
    left, top, right, bottom = values
    return left, top, right, bottom


def read_original(folder: Path, names: Iterable[str]) -> GroundTruth:
    """Reads the text files of Oxford5k and Paris6k: <landmark>_<n>_query.txt, _good, _ok and _junk.

    Args:
        folder: that holds them.
        names: of the database images; damaged ones of Paris are left out.

    Raises:
        UserError: no queries, missing lists, or images that are none of `names`.
    """
    listed = [name for name in names if name not in BROKEN]
    number = {name: i for i, name in enumerate(listed)}
    queries = []
    for path in sorted(folder.glob("*_query.txt")):
        words = path.read_text().split()
        try:
            name, box = words[0].removeprefix("oxc1_"), _box([float(word) for word in words[1:5]])
            stem = path.name.removesuffix("_query.txt")
            lists = {key: (folder / f"{stem}_{key}.txt").read_text().split() for key in ("good", "ok", "junk")}
            sets = {
                key: tuple(number[image] for image in images if image not in BROKEN) for key, images in lists.items()
            }
        except KeyError as error:
            raise UserError(f"{path}: names {error}, which is none of the {len(listed)} images") from error
        except (OSError, ValueError, IndexError) as error:
            raise UserError(f"{path}: no query of Oxford or Paris with its lists ({first_line(error)})") from error
        queries.append(Query(name, box, {"ok": sets["good"] + sets["ok"], "junk": sets["junk"]}))
    return _checked(GroundTruth(listed, queries, "original"), folder)


def _checked(truth: GroundTruth, path: Path) -> GroundTruth:
    if not truth.queries or not truth.names:
        raise UserError(
            f"{path}: {len(truth.queries)} queries over {len(truth.names)} images; the ground truth is empty"
        )
    for query in truth.queries:
        outside = [i for positions in query.sets.values() for i in positions if not 0 <= i < len(truth.names)]
        if outside:
            raise UserError(f"{path}: query {query.name} counts on image {outside[0]} of {len(truth.names)}")
    if not any(len(positive) for level in LEVELS[truth.protocol] for positive, _ in truth.positives(level)):
        raise UserError(f"{path}: no query has a positive image; the ground truth is empty")
    return truth


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({first_line(error)})") from error


def read_plain_pickle(path: Path) -> Any:
    """Plain data and numeric arrays of a pickle file; no name that it refers to is ever imported.

    Raises:
        UserError: unreadable, or it refers to anything else.
    """
    try:
        with path.open("rb") as file:
            return _PlainUnpickler(file, encoding="latin1").load()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # a damaged pickle can fail anywhere
        raise UserError(f"{path}: not readable as a pickle of plain data ({first_line(error)})") from error


class _Array:
    """Stands in for a numeric array until its state comes."""

    def __init__(self, *_: Any) -> None:
        self.values = np.empty(0)

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, by_columns, data = state
        raw = data.encode("latin1") if isinstance(data, str) else data
        self.values = np.frombuffer(raw, dtype=kind.name).reshape(shape, order="F" if by_columns else "C")

    def __iter__(self) -> Any:
        return iter(self.values.tolist())


class _Kind:
    """Stands in for the type of an array's numbers."""

    def __init__(self, name: str, *_: Any) -> None:
        if not re.fullmatch(r"[<>|=]?[iuf][1248]|b1", str(name)):
            raise UserError(f"an array of {name!r} in a pickle; only numbers are read")
        self.name = str(name)

    def __setstate__(self, state: Any) -> None:
        if state[1] in ("<", ">"):
            self.name = state[1] + self.name.lstrip("<>|=")


def _scalar(kind: _Kind, data: Any) -> Any:
    raw = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(raw, dtype=kind.name)[0].item()


def _from_buffer(data: Any, kind: _Kind, shape: Any, order: Literal["C", "F"]) -> _Array:
    array = _Array()
    array.values = np.frombuffer(data, dtype=kind.name).reshape(shape, order=order)
    return array


_STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Kind,
    ("_codecs", "encode"): lambda text, _: text.encode("latin1"),
    **{(module, "bytes"): lambda *_: b"" for module in ("builtins", "__builtin__")},
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
}
"""what arrays are pickled with, and what takes its place here"""


class _PlainUnpickler(pickle.Unpickler):
    """Finds nothing but stand-ins of our own."""

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for an array's parts.

        Raises:
            UserError: any other name.
        """
        if (module, name) not in _STAND_INS:
            raise UserError(f"a pickle that wants to run code on loading ({module}.{name}); refused")
        return _STAND_INS[module, name]

    def persistent_load(self, pid: Any) -> NoReturn:
        """Refuse references out of the file."""
        raise UserError("a pickle that refers to data outside of it; refused")
