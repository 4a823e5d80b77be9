"""Curves and bars as inline SVG: colours come from the page (light and dark), no text of the user goes in unescaped."""

from __future__ import annotations

import html
import io
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

MAX_POINTS = 600
MAX_POINTS_OF_A_CHART = 4800
SERIES = 8
# matplotlib wants real colours: these stand for the page's colours and are replaced in the SVG.
_INK, _FAINT = "#b00001", "#b00002"
_LINES = [f"#a0000{at}" for at in range(SERIES)]
_DASHES: list[tuple[int, tuple[float, ...]] | str] = ["-", (0, (5, 1.5)), (0, (2, 1.2)), (0, (6, 1.5, 1.5, 1.5))]
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "clusterssl",
    "path.simplify": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _FAINT,
    "grid.linewidth": 0.4,
    "lines.linewidth": 1.6,
}


@dataclass(frozen=True)
class Series:
    """One line of a chart; `x` and `y` are equally long."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def thinned(x: Sequence[float], y: Sequence[float], most: int = MAX_POINTS) -> tuple[list[float], list[float]]:
    """At most `most` points: means over consecutive shares, so that a long run stays small and no peak misleads."""
    if len(x) <= most:
        return list(x), list(y)
    edges = [at * len(x) // most for at in range(most + 1)]
    spans = list(itertools.pairwise(edges))
    return [sum(x[a:b]) / (b - a) for a, b in spans], [sum(y[a:b]) / (b - a) for a, b in spans]


def line_chart(
    key: str,
    title: str,
    series: Sequence[Series],
    *,
    levels: Sequence[tuple[float, str]] = (),
    floor: bool = False,
    percent: bool = False,
    large: bool = False,
) -> str:
    """A chart of lines over training steps as an `<svg>` element.

    Args:
        key: name of the chart, unique on its page.
        title: for readers who do not see it.
        series: the lines; empty ones keep their colour but are not drawn.
        levels: horizontal lines of comparison with their labels.
        floor: whether the vertical axis begins at zero.
        percent: whether shares are written in percent.
        large: whether the chart takes half the width of the page, else a third.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes("step", large)
        most = min(MAX_POINTS, MAX_POINTS_OF_A_CHART // max(len(series), 1))
        for at, line in enumerate(series):
            if line.x:
                x, y = thinned(line.x, line.y, most)
                axes.plot(
                    x, y, color=_LINES[at % SERIES], linestyle=_DASHES[at % len(_DASHES)], gid=f"series{at}",
                    marker="o" if len(x) == 1 else None,
                )  # fmt: skip
        for level, label in levels:
            _level(axes, level, label)
        if floor:
            axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]) if _lowest(series) < 0 else 0.0)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if percent:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.3g}%"))
        return _svg(figure, key, title, "; ".join(_in_words(line) for line in series if line.x))


def use_chart(key: str, title: str, counts: Sequence[tuple[str, Sequence[int]]]) -> str:
    """Assignments per prototype, most used first, as shares of all; one outline a run, filled if it is alone."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes("prototypes, most used first", large=True)
        words = []
        for at, (name, count) in enumerate(counts):
            total = max(sum(count), 1)
            shares = sorted((number / total for number in count), reverse=True)
            heights, edges = _steps(shares, min(MAX_POINTS, MAX_POINTS_OF_A_CHART // len(counts)))
            axes.stairs(
                heights, edges, color=_LINES[at % SERIES], fill=len(counts) == 1, linestyle=_DASHES[at % len(_DASHES)],
                linewidth=1.4, baseline=0 if len(counts) == 1 else None, gid=f"use{at}",
            )  # fmt: skip
            ends = f"the most used holds {shares[0]:.1%}, the least used {shares[-1]:.1%}"
            words.append(f"{name}: {len(shares)} prototypes, {ends}")
        for size in sorted({len(count) for _, count in counts}):
            _level(axes, 1 / size, "equal use")
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.3g}%"))
        return _svg(figure, key, title, "; ".join(words))


def _steps(heights: Sequence[float], most: int) -> tuple[list[float], list[float]]:
    """At most `most` steps, each the mean of its share of the heights, and the edges between them."""
    number = min(len(heights), most)
    edges = [at * len(heights) // number for at in range(number + 1)]
    return [sum(heights[a:b]) / (b - a) for a, b in itertools.pairwise(edges)], [float(edge) for edge in edges]


def _axes(label: str, large: bool) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.2, 2.7) if large else (3.5, 2.1), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.grid(axis="y")
    axes.tick_params(length=0)
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(6 if large else 4, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5 if large else 4))
    axes.patch.set_visible(False)
    figure.patch.set_visible(False)
    return figure, axes


def _level(axes: Axes, level: float, label: str) -> None:
    axes.axhline(level, color=_INK, linewidth=0.9, linestyle=(0, (3, 3)))
    axes.annotate(
        label, (1, level), xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points", ha="right"
    )


def _lowest(series: Sequence[Series]) -> float:
    return min((min(line.y) for line in series if line.y), default=0.0)


def _in_words(line: Series) -> str:
    return (
        f"{line.name}: from {line.y[0]:.4g} at step {line.x[0]:.0f} to {line.y[-1]:.4g} at step {line.x[-1]:.0f}, "
        f"lowest {min(line.y):.4g}, highest {max(line.y):.4g}"
    )


def _svg(figure: Figure, key: str, title: str, description: str) -> str:
    """The figure as an element of the page: own ids, colours by CSS variables, title and description, no metadata."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None}, transparent=True)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.S)
    text = re.sub(r'"[^"]*\d\.\d{3}[^"]*"', lambda value: _rounded(value.group()), text)
    text = text.replace("xlink:href", "href")
    text = re.sub(r'\bid="', f'id="{key}-', text)
    text = re.sub(r'href="#', f'href="#{key}-', text)
    text = text.replace("url(#", f"url(#{key}-")
    for at, colour in enumerate(_LINES):
        text = text.replace(colour, f"var(--line{at})")
    text = text.replace(_INK, "var(--ink)").replace(_FAINT, "var(--faint)")
    box = re.search(r'viewBox="[^"]+"', text)
    opening = (
        f'<svg class="chart" {box.group() if box else ""} role="img" aria-labelledby="{key}-title {key}-desc">'
        f'<title id="{key}-title">{html.escape(title)}</title><desc id="{key}-desc">{html.escape(description)}</desc>'
    )
    return opening + text[text.index(">") + 1 :].strip()


def _rounded(coordinates: str) -> str:
    """Numbers to a hundredth of a point, which halves the page."""
    return re.sub(r"-?\d+\.\d{3,}", lambda number: f"{float(number.group()):.2f}", coordinates)
