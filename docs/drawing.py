"""What the figures of the documentation share: style, files that come out the same each time, digits as pictures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(__file__).resolve().parent / "figures"
BLUE, RUST, GREY = "#3b6ea5", "#b0562f", "#8a8a8a"
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "clusterssl",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "figure.facecolor": "white",
}


def canvas(columns: int, width: float = 8.0, height: float = 2.2, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure and its panels, row by row."""
    pyplot.rcParams.update(STYLE)
    figure, axes = pyplot.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False)
    return figure, list(axes.flat)


def keep(figure: Figure, name: str, folder: Path = FOLDER) -> None:
    """Write an SVG without date; the same numbers give the same file."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    text = (folder / f"{name}.svg").read_text(encoding="utf-8")
    (folder / f"{name}.svg").write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n", encoding="utf-8")


def strip(axes: Axes, images_N3HW: Tensor, title: str = "") -> None:
    """Grey images side by side, uint8."""
    axes.imshow(
        images_N3HW[:, 0].permute(1, 0, 2).flatten(1).numpy(), cmap="gray", vmin=0, vmax=255, interpolation="none"
    )
    axes.set_axis_off()
    axes.set_title(title, loc="left", fontsize=8, pad=2)
