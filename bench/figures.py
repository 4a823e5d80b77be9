"""The times in a result file, whatever the bench that wrote it: what `compare.py` reads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
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
    except OSError as error:
        raise UserError(f"{path}: not a readable result ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: not a readable result ({error})") from error
    for part in ("hardware", "result"):
        if not isinstance(record, dict) or not isinstance(record.get(part), dict):
            raise UserError(f'{path}: not a result of a bench, which has a table "{part}"')
    if not isinstance(record["result"].get("options", {}), dict):
        raise UserError(f'{path}: not a result of a bench, its "options" are no table')
    return record


def figures(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Figure]]:
    """All times below a value of a result, with the keys that lead to each."""
    if isinstance(value, dict):
        if {"median", "low", "high"} <= value.keys():
            times = Figure(value["median"], value["low"], value["high"])
            if all(map(_is_number, times)) and times.median > 0:
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
    if not numbers or not all(_is_number(x) and x > 0 for x in numbers):
        return
    times = sorted(1e3 / x if "_per_" in path[-1] else _scale(path) * x for x in numbers)
    quarter = len(times) // 4
    yield path, Figure(median(times), times[quarter], times[-1 - quarter])


def ratios(times: Mapping[tuple[str, ...], Figure]) -> dict[tuple[str, ...], Figure]:
    """Ours over each other system that the same run measured in the same place; the widest span of both spreads."""
    found = {}
    for path, own in times.items():
        for place in (i for i, key in enumerate(path) if key.startswith("ours")):
            for other, one in times.items():
                beside = other[:place] == path[:place] and other[place + 1 :] == path[place + 1 :]
                if beside and len(other) == len(path) and not other[place].startswith("ours") and one.low > 0:
                    label = (*path[:place], f"{path[place]} over {other[place]}", *path[place + 1 :])
                    found[label] = Figure(own.median / one.median, own.low / one.high, own.high / one.low)
    return found


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


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
