"""The pages in a real browser: they render, nothing goes wrong in the console, nothing is loaded from outside."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clusterssl.report import Gallery, Table, strip, write_report
from clusterssl.report.page import write_page
from tests.report.runs import write_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (apt-get install chromium)")


def browse(page: Path, *words: str) -> tuple[str, list[str]]:
    """What a browser prints about a page, and its complaints: console messages and loads that fail."""
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--hide-scrollbars",
        "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={page.parent / 'profile'}", *words, page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def asked(page: Path, expression: str) -> str:
    """A JavaScript expression once a copy of the page has loaded."""
    copy = page.with_name("asked.html")
    script = f"<script>addEventListener('load', () => document.title = 'says ' + ({expression}))</script></body>"
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", script), encoding="utf-8")
    title = re.search(r"<title>says (.*?)</title>", browse(copy, "--dump-dom")[0])
    assert title
    return title[1].strip()


LOADS = "performance.getEntriesByType('resource').map((x) => x.name).filter((x) => !x.startsWith('data:')).join(' ')"


def gallery() -> Gallery:
    images = [np.full((8, 8, 3), value, np.uint8) for value in (0, 120, 250)]
    pictures = [strip(images, photo=photo) for photo in (False, True)]
    return Gallery("Clusters", tuple((f"cluster {i}", f"words {i}", x) for i, x in enumerate(pictures)), wide=True)


def test_a_report_renders(tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    write_report([write_run(tmp_path / name) for name in ("a", "b")], out, galleries=[gallery()])
    found, complaints = browse(out, "--dump-dom")
    assert not complaints
    assert asked(out, LOADS) == ""
    assert found.count("<svg") == 10 and found.count("<img") == 2 and "ln K = " in found
    _, complaints = browse(out, "--window-size=900,1400", f"--screenshot={tmp_path / 'page.png'}")
    assert not complaints
    pixels = np.asarray(Image.open(tmp_path / "page.png").convert("RGB"))
    assert pixels.shape == (1400, 900, 3) and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50, "it is not blank"
    browse(out, f"--print-to-pdf={tmp_path / 'page.pdf'}")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")


def test_pictures_and_folded_tables_render(tmp_path: Path) -> None:
    """Every picture has its size, which a browser only knows of pictures that it could decode."""
    out = tmp_path / "page.html"
    rows = tuple((str(i), "x") for i in range(30))
    write_page(out, title="T", tables=[Table("Long", ("a", "b"), rows)], galleries=[gallery()])
    found, complaints = browse(out, "--dump-dom")
    assert not complaints
    assert asked(out, "[...document.images].map((x) => x.naturalWidth).join(' ')") == "100 100"
    assert "<summary>Long: 30 rows</summary>" in found


def test_the_browser_would_complain(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text("<html><head><title>x</title></head><body><script>undefinedFunction()</script></body></html>")
    assert browse(page, "--dump-dom")[1]
    page.write_text(
        page.read_text().replace("<script>undefinedFunction()</script>", "<img src='https://a.test/x.png'>")
    )
    assert asked(page, LOADS) == "https://a.test/x.png"
