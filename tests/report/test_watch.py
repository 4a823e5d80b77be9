"""The served page grows with its run and is there for this machine only."""

from __future__ import annotations

import shutil
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from clusterssl.errors import UserError
from clusterssl.report import Gallery
from clusterssl.report.watch import server
from tests.launch import Launched
from tests.report.runs import write_lines, write_run


@contextmanager
def served(*runs: Path, **more: Any) -> Iterator[str]:
    serving = server(runs, seconds=7, **more)
    thread = threading.Thread(target=serving.serve_forever)
    thread.start()
    try:
        assert serving.server_address[0] == "127.0.0.1"
        yield f"http://127.0.0.1:{serving.server_port}/"
    finally:
        serving.shutdown()
        serving.server_close()
        thread.join()


def test_the_page_grows(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with served(run) as address:
        with urllib.request.urlopen(address) as answer:
            page = answer.read().decode()
            assert '<noscript><meta http-equiv="refresh" content="7"></noscript>' in page and 'data-seconds="7"' in page
            assert "44% below ln K" in page and "77.25" not in page
        write_lines(run / "evaluations.jsonl", [{"eval": "knn", "k": 20, "top1": 77.25}])
        with urllib.request.urlopen(address) as answer:
            assert "77.25" in answer.read().decode()
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(address + "run.json")
        shutil.rmtree(run)
        with urllib.request.urlopen(address) as answer:
            assert "no such run directory" in answer.read().decode()


def test_pictures_are_asked_for_with_every_page(tmp_path: Path) -> None:
    asked = iter(
        [("Pictures: later.", []), ("Pictures: now.", [Gallery("Largest clusters", (("cluster 1", "w", "p"),))])]
    )
    with served(write_run(tmp_path / "run"), pictures=lambda: next(asked)) as address:
        for words, there in (("Pictures: later.", False), ("Pictures: now.", True)):
            with urllib.request.urlopen(address) as answer:
                page = answer.read().decode()
            assert words in page and ("Largest clusters" in page) is there


def test_runs_that_have_not_begun_are_waited_for(tmp_path: Path) -> None:
    late, empty = tmp_path / "late <b>", tmp_path / "empty"
    empty.mkdir()
    (empty / "slurm-1.out").write_text("begins soon")
    with served(late, empty) as address:
        with urllib.request.urlopen(address) as answer:
            page = answer.read().decode()
        assert answer.status == 200 and '<meta http-equiv="refresh" content="7">' in page
        assert "waits for it" in page and "late &lt;b&gt;: no such run directory" in page and "slurm-1.out" in page
        shutil.rmtree(empty)
        write_run(empty)
        with urllib.request.urlopen(address) as answer:
            page = answer.read().decode()
        assert "44% below ln K" in page and "Not there yet: " in page and "late &lt;b&gt;" in page
        write_run(late)
        with urllib.request.urlopen(address) as answer:
            assert "Not there yet" not in answer.read().decode()


def test_head_is_get_without_the_body(tmp_path: Path) -> None:
    with served(write_run(tmp_path / "run")) as address:
        with urllib.request.urlopen(address) as answer:
            headers, length = dict(answer.headers), len(answer.read())
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD")) as answer:
            assert answer.status == 200 and answer.read() == b""
            assert answer.headers["Content-Type"] == headers["Content-Type"] == "text/html; charset=utf-8"
            assert int(answer.headers["Content-Length"]) > 0.9 * length
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(urllib.request.Request(address + "run.json", method="HEAD"))


def test_report_waits_for_a_run_that_has_not_begun(tmp_path: Path) -> None:
    run = tmp_path / "run"
    launched = Launched("report.py", str(run), "--watch")
    process, end = launched.processes[0], time.monotonic() + 120
    while "http://" not in process.texts[0] and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    address = process.texts[0].split("http://")[1].split()[0]
    write_run(run)
    with urllib.request.urlopen(f"http://{address}") as answer:
        assert "44% below ln K" in answer.read().decode()
    launched.send(signal.SIGINT)
    codes, printed = launched.wait()
    assert codes == [130] and f"{run}: no run yet, the page waits for it" in printed.splitlines()


@pytest.mark.parametrize("word", ["70000", "x"])
def test_a_port_that_is_none_is_refused_in_one_line(word: str, tmp_path: Path) -> None:
    codes, printed = Launched("report.py", str(tmp_path), "--watch", "--port", word).wait()
    remedy = "give a number up to 65535, or leave the flag out"
    assert codes == [2] and printed == f"report.py: error: --port: '{word}' is no port; {remedy}\n"


def test_bad_input(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: a file; give the folder"):
        server([tmp_path / "file"])
    first = server([write_run(tmp_path / "run")])
    with first, pytest.raises(UserError, match=r"--port .*: cannot be used"):
        server([tmp_path / "run"], first.server_port)
