"""The page: self-contained, well formed, escaped, complete."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clusterssl.errors import UserError
from clusterssl.labelling.sample import BYTES_OF_A_RUN
from clusterssl.report import Gallery, Table, strip, write_report
from clusterssl.report.page import write_page
from clusterssl.report.pictures import grid
from tests.report.runs import losses, write_lines, write_run

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = '<script>alert("x")</script><img src=x onerror=1>'
VOID = {"meta", "img", "link", "br", "hr", "input"}


class Page(HTMLParser):
    """Collects tags, attributes and texts; complains about tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def page_of(out: Path) -> Page:
    return Page(out.read_text(encoding="utf-8"))


def test_one_run_has_all_parts(tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    write_report([write_run(tmp_path / "run")], out)
    page = page_of(out)
    text = " ".join(page.texts)
    for part in ("44% below ln K", "python main_swav.py --epochs 2", "nmb_crops", "2 6", "versions torch", "95.25"):
        assert part in text, part
    assert page.count("svg") == 10, "nine quantities and the use of the prototypes"
    assert out.stat().st_size < 500_000


def test_nothing_is_loaded_from_anywhere(tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    picture = strip([np.zeros((8, 8), dtype=np.uint8)])
    gallery = Gallery("G", (("cluster", "eight zeros", picture),))
    write_report([write_run(tmp_path / "run")], out, galleries=[gallery])
    page = page_of(out)
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base"), tag
        for name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:image/png;base64,")), f"{tag} {name}={value[:60]}"
    text = out.read_text(encoding="utf-8")
    assert "@import" not in text and "http:" not in text and "https:" not in text


def test_readers_without_eyes_or_mouse(tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    write_report([write_run(tmp_path / "run")], out, galleries=[Gallery("G", (("c", "words", strip([_grey(3)])),))])
    page = page_of(out)
    assert dict(page.tags)["html"]["lang"] == "en"
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    for tag, attributes in page.tags:
        if tag == "svg":
            assert attributes["role"] == "img"
        if tag == "img":
            assert attributes["alt"] == "words"
        if tag == "th":
            assert attributes["scope"] in ("row", "col")
        for name in (attributes.get("aria-labelledby") or "").split():
            assert name in ids, name
    assert page.count("svg") <= page.count("desc") and page.count("table") == page.count("caption")


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run <b>&", command=HOSTILE, config={HOSTILE: HOSTILE}, versions={HOSTILE: HOSTILE})
    write_lines(folder / "evaluations.jsonl", [{"eval": HOSTILE, HOSTILE: HOSTILE}])
    out = tmp_path / "report.html"
    table = Table(HOSTILE, (HOSTILE, "b"), ((HOSTILE, HOSTILE),), HOSTILE)
    gallery = Gallery(HOSTILE, ((HOSTILE, '" onerror="1', strip([_grey(1)])),), HOSTILE)
    write_report([folder], out, title=HOSTILE, lead=HOSTILE, tables=[table], galleries=[gallery])
    page = page_of(out)
    assert page.count("script") == 1, "the page's own"
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert any(HOSTILE in text for text in page.texts)


def test_several_runs_share_charts_and_have_a_legend(tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    write_report([write_run(tmp_path / name, curve=losses(steps)) for name, steps in (("a", 60), ("b", 9))], out)
    page = page_of(out)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert "loss-series0" in ids and "loss-series1" in ids and len(ids) == len(set(ids))
    assert any(attributes.get("class") == "legend" for _, attributes in page.tags)


def test_what_all_rows_of_an_evaluation_share_is_said_once(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_lines(run / "evaluations.jsonl", [{"eval": "knn", "k": k, "top1": 90.0 + k, "arch": "conv4"} for k in (1, 5)])
    write_report([run], tmp_path / "report.html")
    texts = [text.strip() for text in page_of(tmp_path / "report.html").texts]
    assert "In all rows: arch conv4." in texts and texts.count("conv4") == 0 and "91" in texts and "95" in texts


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"method": "swav", "git": None, "config": None, "argv": ["a", 1]}))
    write_report([folder], tmp_path / "report.html")
    assert "No training step was logged yet." in " ".join(page_of(tmp_path / "report.html").texts)


def test_thousands_of_prototypes_and_steps_stay_small(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", curve=losses(20_000, 3000), prototypes=3000)
    write_report([folder], tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 2_000_000


def test_many_runs_leave_room_for_pictures(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"run{i}", curve=losses(2000, 3000), prototypes=3000) for i in range(12)]
    write_report(runs, tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < len(runs) * BYTES_OF_A_RUN


def test_strip_is_a_png_of_the_images() -> None:
    address = strip([_grey(10), np.full((8, 8, 3), (200, 0, 0), dtype=np.uint8)], side=16, gap=2)
    picture = Image.open(io.BytesIO(base64.b64decode(address.split(",")[1])))
    assert picture.size == (34, 16)
    assert picture.getpixel((3, 3)) == (10, 10, 10, 255) and picture.getpixel((30, 3)) == (200, 0, 0, 255)
    assert picture.getpixel((16, 3)) == (0, 0, 0, 0)


def test_bad_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run directory given"):
        write_report([], tmp_path / "report.html")
    with pytest.raises(UserError, match="no such folder"):
        write_report([write_run(tmp_path / "run")], tmp_path / "absent" / "report.html")


def test_script(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")

    def report(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "report.py"), *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    done = report("run")
    assert done.returncode == 0 and (run / "report.html").is_file() and "report.html" in done.stdout, done.stderr
    absent = report("absent")
    assert absent.returncode == 2 and len(absent.stderr.splitlines()) == 1 and "absent" in absent.stderr
    unknown = report("run", "--outt", "x")
    assert unknown.returncode == 2 and len(unknown.stderr.splitlines()) == 1


def _grey(value: int) -> np.ndarray:
    return np.full((8, 8), value, dtype=np.uint8)


def test_a_page_about_no_run(tmp_path: Path) -> None:
    out = tmp_path / "clusters.html"
    gallery = Gallery("Best", (("cluster 3", "nine cats", strip([_grey(1)])),))
    write_page(out, title=HOSTILE, lead="two", tables=[Table("T", ("a", "b"), (("1", "2"),))], galleries=[gallery])
    page = page_of(out)
    assert page.count("img") == 1 and page.count("table") == 1 and HOSTILE in "".join(page.texts)
    assert not any(words in page.texts for words in ("In words", "Training", "How it was made"))
    with pytest.raises(UserError, match="no such folder"):
        write_page(tmp_path / "none" / "x.html", title="x")


def test_a_grid_of_pictures() -> None:
    rows = [[np.full((9, 9, 3), value, np.uint8) for value in (10, 20)], [np.full((9, 9), 30, np.uint8)]]
    with Image.open(io.BytesIO(grid(rows, side=8, border=1, gap=3))) as sheet:
        pixels = np.asarray(sheet)
    assert pixels.shape == (2 * 10 + 3 * 3, 2 * 10 + 2 * 3, 3)
    assert (pixels[3, 3:23] == 0).all() and (pixels[4:12, 4:12] == 10).all() and (pixels[4:12, 14:22] == 20).all()
    assert (pixels[17:25, 4:12] == 30).all() and (pixels[13:, 13:] == 255).all() and (pixels[:3] == 255).all()
