"""Tables that read the same on the screen and on the page, and curves made of characters."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BLOCKS = "▁▂▃▄▅▆▇█"
ASCII_BLOCKS = "_.-=+*#@"


@dataclass(frozen=True)
class Table:
    """Rows of text; the first column heads its row."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    runs: tuple[int, ...] = ()
    """of each row the run of the page that it is of, if it is of one"""

    def text(self) -> str:
        """The table in characters: first column left, the others right."""
        grid = [self.columns, *self.rows]
        widths = [max(len(row[at]) for row in grid) for at in range(len(self.columns))]
        lines = [
            "  ".join(cell.rjust(width) if at else cell.ljust(width) for at, (cell, width) in enumerate(cells)).rstrip()
            for cells in (list(zip(row, widths, strict=True)) for row in grid)
        ]
        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        return "\n".join([self.title, rule, lines[0], rule, *lines[1:], rule, *([self.note] if self.note else [])])


def table_of(title: str, records: Sequence[Mapping[str, Any]], leave_out: Sequence[str] = ()) -> Table:
    """A table with one row a record and one column a key, keys in the order of first appearance."""
    columns = list(dict.fromkeys(key for record in records for key in record if key not in leave_out))
    rows = tuple(tuple(shown(record[key]) if key in record else "" for key in columns) for record in records)
    return Table(title, tuple(columns), rows)


def shown(value: Any) -> str:
    """A value of a record as a reader wants it: four significant digits, lists by spaces."""
    if isinstance(value, float):
        if math.isfinite(value) and value == int(value) and abs(value) < 1e15:
            return str(int(value))
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return " ".join(shown(part) for part in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {shown(part)}" for key, part in value.items())
    return "" if value is None else str(value)


def sparkline(values: Sequence[float], width: int = 60, blocks: str = BLOCKS) -> str:
    """A curve of `width` characters at most, each the mean of its share of the finite values, low to high."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    width = min(width, len(finite))
    edges = [at * len(finite) // width for at in range(width + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    top = len(blocks) - 1
    return "".join(blocks[round((mean - low) / (high - low) * top) if high > low else 0] for mean in means)
