"""The times in a result file, whatever the bench that wrote it: what `compare.py` reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from clusterssl.errors import UserError


class Figure(NamedTuple):
    """A time in milliseconds; that of one image where a bench counts images a second."""

    median: float
    low: float
    """first quartile; the median where it was measured once"""
    high: float


def read(path: Path) -> dict[str, Any]:
    """A result file.

    Raises:
        UserError: it is none.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable result ({error})") from error
    if not isinstance(record, dict) or "result" not in record:
        raise UserError(f"{path}: not a result of a bench")
    return record


def figures(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Figure]]:
    """All times below a value of a result, with the keys that lead to each."""
    if isinstance(value, dict):
        if {"median", "low", "high"} <= value.keys():
            times = Figure(value["median"], value["low"], value["high"])
            yield path, Figure(*(_scale(path) * x for x in times))
            return
        for key, inner in value.items():
            if key != "options":
                yield from figures(inner, (*path, str(key)))
    elif isinstance(value, list) and value and all(isinstance(x, dict) for x in value):
        for number, inner in enumerate(value):
            yield from figures(inner, (*path, _label(inner, number)))
    elif _is_time(path):
        yield from _of_numbers(value if isinstance(value, list) else [value], path)


def _of_numbers(numbers: list[Any], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Figure]]:
    if not numbers or any(isinstance(x, bool) or not isinstance(x, (int, float)) or x <= 0 for x in numbers):
        return
    times = sorted(1e3 / x if "_per_" in path[-1] else _scale(path) * x for x in numbers)
    quarter = len(times) // 4
    yield path, Figure(median(times), times[quarter], times[-1 - quarter])


def _is_time(path: tuple[str, ...]) -> bool:
    """Whether the last keys name a time or speed; medians of lists that stand beside them are left out."""
    named = any(key.endswith(("seconds", "_s")) for key in path[-2:])
    return named and not any(key.startswith(("median_", "all_")) or "_over_" in key for key in path)


def _scale(path: tuple[str, ...]) -> float:
    return 1.0 if any(key.startswith("ms") for key in path) else 1e3


def _label(row: dict[str, Any], number: int) -> str:
    """What tells a row of a list from the others: its whole numbers and words."""
    told = [f"{key} {x}" for key, x in row.items() if isinstance(x, (int, str)) and not isinstance(x, bool)]
    return ", ".join(told) or str(number)
