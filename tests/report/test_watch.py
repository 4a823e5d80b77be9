"""The served page grows with its run and is there for this machine only."""

from __future__ import annotations

import shutil
import threading
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


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run directory"):
        server([tmp_path / "none"])
    first = server([write_run(tmp_path / "run")])
    with first, pytest.raises(UserError, match=r"--port .*: cannot be used"):
        server([tmp_path / "run"], first.server_port)
