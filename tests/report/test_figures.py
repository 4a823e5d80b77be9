"""The drawn curves hold the data, fit into the page, and carry no text as markup."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from clusterssl.report.figures import MAX_POINTS, Series, line_chart, thinned, use_chart
from tests.report.runs import losses


def points(svg: str, gid: str) -> np.ndarray:
    """Corners of the path inside the group of that id, [n, 2] in drawing units."""
    root = ET.fromstring(svg)
    group = next(node for node in root.iter() if node.get("id") == gid)
    path = next(node.get("d") or "" for node in group.iter() if node.tag.endswith("path"))
    return np.array([[float(x), float(y)] for x, y in re.findall(r"[ML] (-?[\d.]+) (-?[\d.]+)", path)])


def test_a_curve_is_an_affine_picture_of_its_data() -> None:
    y = losses()
    drawn = points(line_chart("loss", "Loss", [Series("a", range(60), y)]), "loss-series0")
    assert drawn.shape == (60, 2)
    slope, offset = np.polyfit(y, drawn[:, 1], 1)
    assert slope < 0, "larger values stand higher"
    assert np.abs(drawn[:, 1] - (slope * np.array(y) + offset)).max() < 0.02
    assert np.corrcoef(np.arange(60), drawn[:, 0])[0, 1] == pytest.approx(1, abs=1e-6)


def test_empty_series_and_single_points() -> None:
    svg = line_chart("c", "C", [Series("empty", [], []), Series("one", [3], [1.5])])
    assert "c-series0" not in svg and "c-series1" in svg


def test_titles_are_escaped_and_ids_belong_to_the_chart() -> None:
    svg = line_chart("c", "A <b> & c", [Series("</desc><script>", [0, 1], [1.0, 2.0])], levels=[(1.5, "ln K = 1.50")])
    root = ET.fromstring(svg)
    assert "script" not in {node.tag for node in root.iter()}
    ids = [node.get("id") for node in root.iter() if node.get("id")]
    assert len(ids) == len(set(ids)) and all(str(name).startswith("c-") for name in ids)
    for name in re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"", svg):
        assert (name[0] or name[1]) in ids
    assert root.get("aria-labelledby") == "c-title c-desc"


def test_small_tick_values_keep_their_digits() -> None:
    svg = line_chart("lr", "Rate", [Series("a", [0, 1], [0.0, 0.003])])
    texts = [node.text or "" for node in ET.fromstring(svg).iter() if node.tag.endswith("text")]
    assert any(text.startswith("0.00") and float(text) > 0 for text in texts)


def test_long_curves_are_thinned_to_means() -> None:
    x, y = thinned(range(10_000), [float(at % 2) for at in range(10_000)])
    assert len(x) == MAX_POINTS and max(abs(value - 0.5) for value in y) < 0.05
    assert thinned([1, 2], [3, 4]) == ([1, 2], [3, 4])


def test_prototype_use_is_sorted_and_complete() -> None:
    svg = use_chart("use", "Use", [("a", [1, 5, 3]), ("b", [2, 2, 2])])
    heights = points(svg, "use-use0")[:, 1]
    assert len(np.unique(heights)) == 3
    assert (np.diff(heights) >= 0).all(), "shares fall, so drawing heights grow downwards"
    assert len(np.unique(points(svg, "use-use1")[:, 1])) == 1
    assert "a: 3 prototypes, the most used holds 55.6%, the least used 11.1%" in svg
