"""Text and lines of the page stand out from what is behind them, light, dark and on paper (WCAG 1.4.3, 1.4.11)."""

from __future__ import annotations

import re
from importlib import resources

import pytest

CSS = resources.files("clusterssl.report").joinpath("page.css").read_text(encoding="utf-8")
LIGHT, DARK, PAPER = (
    dict(re.findall(r"(--\w+): (#[0-9a-f]{6});", block)) for block in re.findall(r":root {(.*?)}", CSS, flags=re.S)
)
SCHEMES = {"light": LIGHT, "dark": {**LIGHT, **DARK}, "print": {**LIGHT, **PAPER}}


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_that_of_the_standard() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21) and contrast("#777777", "#ffffff") == pytest.approx(
        4.478, abs=1e-3
    )


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("behind", ["--paper", "--card"])
def test_contrast(scheme: dict[str, str], behind: str) -> None:
    assert len({colours["--paper"] for colours in SCHEMES.values()}) == 3
    for name in ("--ink", "--soft", "--good", "--note", "--bad", "--line0"):  # line0 is also the colour of links
        assert contrast(scheme[name], scheme[behind]) >= 4.5, name
    for name in (f"--line{at}" for at in range(8)):
        assert contrast(scheme[name], scheme[behind]) >= 3, name
