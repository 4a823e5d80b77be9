"""What a bench says of its result: the question, tables with units and ratios, and whether the bars are met.

Every bench has a function `summary(result) -> Summary` and, where figures were demanded of it, `BARS`. The bench prints
its summary at its end; `readme.py` makes the page of the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

GPU = "no GPU yet"
"""why a bar has not been measured"""
MEGABYTES = 1e6 / 2**20
"""one in MiB, in which all memory is told"""
FACTORS = {"us": 1e6, "ms": 1e3, "s": 1.0, "min": 1 / 60}


def number(value: float) -> str:
    """A whole number, or three digits and all of those before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 or isinstance(value, int) else f"{value:#.3g}".rstrip(".")


def quantity(value: float, unit: str) -> str:
    """A number with its unit."""
    return f"{number(value)} {unit}".rstrip()


def duration(seconds: float, unit: str = "ms") -> str:
    """Seconds told in a unit of FACTORS."""
    return quantity(FACTORS[unit] * seconds, unit)


def spread(one: Mapping[str, float], unit: str = "ms") -> str:
    """Median and quartiles of seconds."""
    low, high = (FACTORS[unit] * one[key] for key in ("low", "high"))
    return duration(one["median"], unit) + between(low, high)


def between(low: float, high: float, show: Callable[[float], str] = number) -> str:
    """` (1.00 to 2.00)`; nothing for what was measured once."""
    return "" if low == high else f" ({show(low)} to {show(high)})"


def often(repeats: int, told: str = "quartiles") -> str:
    """What the figures are: `medians of 5 (quartiles)`."""
    return "measured once" if repeats == 1 else f"medians of {repeats:,}" + (f" ({told})" if told else "")


def times(ratio: float) -> str:
    """A ratio."""
    return quantity(ratio, "x")


def percent(share: float) -> str:
    """A share in percent."""
    return quantity(100 * share, "%")


def count(number: int, what: str) -> str:
    """`1 thread`, `2 threads`."""
    return f"{number:,} {what}" + "s" * (number != 1)


@dataclass(frozen=True)
class Line:
    """A figure of the page's first table."""

    what: str
    figure: str
    bar: Bar | None = None
    met: bool | None = None

    @property
    def verdict(self) -> str:
        return "" if self.met is None else "met" if self.met else "missed"


@dataclass(frozen=True)
class Bar:
    """A figure that was demanded."""

    what: str
    limit: float
    unit: str = "x"
    most: bool = False
    """no more than the limit instead of no less"""
    needs: str = "no result yet"
    """why there may be no result"""

    def __str__(self) -> str:
        return f"at {'most' if self.most else 'least'} {self._limit} {self.unit}".rstrip()

    @property
    def _limit(self) -> str:
        return f"{self.limit:,.0f}" if self.limit >= 1000 else f"{self.limit:g}"

    def judge(self, value: float, more: str = "") -> Line:
        """The line of a measured value in this bar's unit, `more` told behind it."""
        met = value <= self.limit if self.most else value >= self.limit
        return Line(self.what, quantity(value, self.unit) + (f" ({more})" if more else ""), self, met)


@dataclass(frozen=True)
class Table:
    """Cells as they are shown."""

    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    title: str = ""
    numbers: bool = True
    """set all columns but the first to the right"""

    def __str__(self) -> str:
        cells = [[str(cell) for cell in row] for row in (self.head, *self.rows)]
        widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
        right = [self.numbers and column > 0 for column in range(len(widths))]
        rule = ["-" * (width - to) + ":" * to for width, to in zip(widths, right, strict=True)]
        lines = [
            " | ".join(cell.rjust(width) if to else cell.ljust(width)
                       for cell, width, to in zip(row, widths, right, strict=True))
            for row in (cells[0], rule, *cells[1:])
        ]  # fmt: skip
        table = "\n".join(f"| {line} |" for line in lines)
        return f"{self.title}\n\n{table}" if self.title else table


@dataclass(frozen=True)
class Summary:
    """A result in words."""

    question: str
    compared: str
    """a few words for the first table"""
    setting: str
    """sizes, threads, device, and what the figures are"""
    tables: Sequence[Table]
    lines: Sequence[Line]
    notes: str = ""

    def __str__(self) -> str:
        parts = [f"**{self.question}**", self.setting, *map(str, self.tables), self.notes]
        told = [
            f"- {line.what}: {line.figure}" + (f"; demanded {line.bar}: **{line.verdict}**" if line.bar else "")
            for line in self.lines
        ]
        return "\n\n".join(part for part in (*parts, "\n".join(told)) if part)


def against(
    found: Mapping[str, Mapping[str, float]], base: str = "ours", unit: str = "ms", what: str = "time"
) -> Table:
    """Medians, quartiles and processor time of systems that took turns, and their ratios to those of one of them."""
    own = found[base]
    rows = [
        (name, spread(one, unit), times(one["median"] / own["median"]), duration(one["cpu"], unit),
         times(one["cpu"] / own["cpu"]))
        for name, one in found.items()
    ]  # fmt: skip
    return Table(("", what, f"over {base}", "CPU time", f"over {base}"), rows)
