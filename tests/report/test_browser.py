"""The pages in a real browser: they render, nothing goes wrong in the console, nothing is loaded from outside."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clusterssl.report import Gallery, Strip, Table, strip, write_report
from clusterssl.report.page import render, write_page
from clusterssl.report.records import read_run
from tests.report.chromium import CHROMIUM, Browser
from tests.report.runs import write_lines, write_run

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


WORDS = [("cluster 4", 90, 0.95), ("cluster 7", 40, 0.6), ("cluster 9, mostly cats", 12, 0.3)]
FOCUS_RING = "getComputedStyle(document.activeElement).outlineStyle + document.activeElement.matches(':focus-visible')"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, each with a gallery of three clusters and a map, and their evaluations."""
    folder = tmp_path_factory.mktemp("page")
    runs = [write_run(folder / name) for name in ("first", "second")]
    for run, top1 in zip(runs, (9.5, 88.0), strict=True):
        write_lines(run / "evaluations.jsonl", [{"eval": "knn", "k": k, "top1": top1 + k} for k in (1, 20)])
    picture = strip([np.full((8, 8, 3), 90, np.uint8)])
    galleries = [
        Gallery(title, tuple(Strip(f"{c} of {run.name}", f"words {c}", picture, n, p) for c, n, p in words), run=run)
        for run in runs
        for title, words in (("Clusters", WORDS), ("Map", [("all", None, None)]))
    ]
    write_report(runs, folder / "report.html", galleries=galleries)
    return folder / "report.html"


@pytest.fixture
def browser(page: Path, tmp_path: Path) -> Iterator[Browser]:
    """The page, opened; when the test ends nothing was complained of and nothing loaded."""
    with Browser(tmp_path) as browser:
        browser.open(page.as_uri())
        yield browser
        assert browser.complaints == [] and browser.loads == []


def seen(browser: Browser, words: str) -> list[str]:
    """Texts of the elements that are on the screen."""
    shown = f"[...document.querySelectorAll({words!r})].filter((x) => x.getClientRects().length)"
    return browser.says(f"{shown}.map((x) => x.textContent.trim())")


def strips(browser: Browser) -> list[str]:
    return seen(browser, ".strip figcaption")


def test_pictures_are_chosen_by_keyboard(browser: Browser) -> None:
    everything = [f"{words} of {run}" for run in ("first", "second") for words, _, _ in WORDS]
    assert strips(browser) == everything and seen(browser, "#pictures-shown") == ["6 of 6 pictures shown"]
    browser.tab_to("x.id === 'text'")
    assert browser.says(FOCUS_RING) == "solidtrue", "who uses the keyboard sees where it is"
    browser.press(*"CATS")
    assert strips(browser) == [everything[2], everything[5]]
    assert seen(browser, "#pictures-shown") == ["2 of 6 pictures shown"]
    browser.press(*["Backspace"] * 4, "Tab", *"40")
    assert strips(browser) == [everything[i] for i in (0, 1, 3, 4)]
    browser.press("Tab", *"61")
    assert strips(browser) == [everything[0], everything[3]]
    browser.press("Tab", *"90")
    assert strips(browser) == [] and seen(browser, "#pictures-shown") == ["0 of 6 pictures shown"]
    assert not [text for text in seen(browser, ".part h3") if "Clusters" in text], "no heading over nothing"
    assert len(seen(browser, ".part h3")) == 2, "maps are no clusters"
    browser.press("Tab", " ")
    browser.says("new Promise((done) => setTimeout(done, 50))")
    assert strips(browser) == everything


def test_runs_and_curves_are_chosen_by_keyboard(browser: Browser) -> None:
    lines = "[...document.querySelectorAll('[id*=-series]')].filter((x) => x.getClientRects().length).length"
    both = browser.says(lines)
    browser.tab_to("x.dataset.shows === '0'")
    browser.press(" ")
    assert seen(browser, "#runs-shown") == ["1 of 2 runs shown"]
    assert browser.says(lines) == both / 2 and all("second" in text for text in strips(browser))
    assert {row.split()[0] for row in seen(browser, ".sortable tbody th")} == {"second"}
    assert "first" not in "".join(seen(browser, "#verdict ~ * h3, #details ~ * h3, .legend li"))
    browser.loaded = False
    browser.ask("Page.reload")
    browser.wait()
    assert seen(browser, "#runs-shown") == ["1 of 2 runs shown"], "a page that is made anew keeps the choice"
    browser.tab_to("x.dataset.shows === '0'")
    browser.press(" ")
    browser.tab_to("x.dataset.curve === 'lr'")
    browser.press(" ")
    assert seen(browser, "#curves-shown") == ["9 of 10 curves shown"]
    assert seen(browser, "#figure-lr") == [] and browser.says(lines) == both - 2


def test_tables_are_sorted_by_keyboard(browser: Browser) -> None:
    def column() -> list[float]:
        return [float(text) for text in seen(browser, ".sortable td:nth-child(3)")]

    assert column() == [10.5, 29.5, 89, 108]
    browser.tab_to("x.textContent === 'top1'")
    browser.press("Enter")
    assert column() == [108, 89, 29.5, 10.5]
    browser.press("Enter")
    assert column() == [10.5, 29.5, 89, 108]
    assert browser.says("document.activeElement.closest('th').getAttribute('aria-sort')") == "ascending"


def test_everything_has_a_name(browser: Browser) -> None:
    told = browser.names()
    wanted = {"figure", "image", "img", "button", "table", "checkbox", "searchbox", "textbox", "spinbutton", "link"}
    wanted |= {"navigation", "group", "region"} - {"group"}
    nameless = [role for role, name in told if role in wanted and not name.strip()]
    assert nameless == []
    roles = [role for role, _ in told]
    assert roles.count("figure") == 10 + 8 and roles.count("main") == roles.count("banner") == 1
    assert {"navigation", "contentinfo", "table", "button", "checkbox", "searchbox", "spinbutton"} <= set(roles)
    browser.press("Tab")
    assert browser.says("document.activeElement.textContent") == "Skip to the content"
    assert browser.says("document.activeElement.getBoundingClientRect().left >= 0")
    browser.press("Enter")
    assert browser.says("document.activeElement.tagName") == "MAIN"


def test_dark_light_and_paper_have_their_colours(browser: Browser) -> None:
    colours = "((x) => x.color + x.backgroundColor)(getComputedStyle(document.body))"
    browser.scheme("light")
    light = browser.says(colours)
    browser.scheme("dark")
    dark = browser.says(colours)
    assert light == "rgb(29, 35, 43)rgb(251, 251, 249)" and dark == "rgb(228, 232, 236)rgb(20, 24, 29)"
    line = "getComputedStyle(document.querySelector('#loss-series0 path')).stroke"
    assert browser.says(line) == "rgb(108, 178, 240)", "curves change with the page"
    assert seen(browser, ".controls") and seen(browser, "nav")
    browser.scheme("dark", media="print")
    assert browser.says(colours) == "rgb(0, 0, 0)rgb(255, 255, 255)"
    assert browser.says(line) == "rgb(31, 111, 180)", "curves are readable on paper"
    assert not seen(browser, ".controls") and not seen(browser, "nav") and len(strips(browser)) == 6


def test_narrow_screens_need_no_sideways_scrolling(browser: Browser, tmp_path: Path) -> None:
    browser.screenshot(tmp_path / "narrow.png", 360)
    assert browser.says("document.documentElement.scrollWidth") <= 360


def test_without_javascript_everything_is_there(page: Path, tmp_path: Path) -> None:
    with Browser(tmp_path) as browser:
        browser.ask("Emulation.setScriptExecutionDisabled", value=True)
        browser.open(page.as_uri())
        names = browser.names()
        assert [role for role, _ in names].count("figure") == 18
        assert not [name for role, name in names if role in ("checkbox", "searchbox", "spinbutton", "button")]


def test_a_growing_page_asks_again_and_stops_when_told(page: Path, tmp_path: Path) -> None:
    out = tmp_path / "growing.html"
    out.write_text(render([read_run(page.parent / "first")], seconds=1), encoding="utf-8")
    with Browser(tmp_path) as browser:
        browser.open(out.as_uri())
        browser.loaded = False
        browser.wait()
        browser.tab_to("x.id === 'again'")
        browser.press(" ")
        browser.says("window.old = true")
        browser.says("new Promise((done) => setTimeout(done, 2500))")
        assert browser.says("window.old"), "it was asked for although that is switched off"
        assert browser.complaints == []


def test_a_browser_would_tell_of_errors_and_loads(tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text("<title>x</title><img alt='' src='https://a.test/x.png'><script>undefinedFunction()</script>")
    with Browser(tmp_path) as browser:
        browser.open(bad.as_uri())
        assert browser.loads == ["https://a.test/x.png"] and any("undefinedFunction" in x for x in browser.complaints)
