"""The page at the end of a run: it is there, with clusters, and whatever happens to it the run has ended well."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from clusterssl import closing
from tests.launch import ROOT, TINY, Launched
from tests.report.runs import write_run
from tests.report.test_page import page_of

FLAGS = [*TINY, "--epochs", "2", "--report", "true"]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_ends_with_its_page(ranks: int, tmp_path: Path) -> None:
    def run() -> str:
        words = [*FLAGS, "--batch_size", str(16 // ranks), "--dump_path", str(tmp_path)]
        codes, printed = Launched("main_swav.py", *words, ranks=ranks).wait()
        assert codes == [0] * ranks, printed
        return printed

    assert run().count("report: ") == 1
    page = page_of(tmp_path / "report.html")
    text = " ".join(page.texts)
    for part in ("Largest clusters", "Smallest clusters", "Purest", "Most confused", "Maps of the features"):
        assert part in text, part
    made = (tmp_path / "report.html").stat().st_mtime_ns
    assert "already trained" in run() and (tmp_path / "report.html").stat().st_mtime_ns == made, "not made again"


def test_a_page_that_cannot_be_written_fails_no_run(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    codes, printed = Launched("main_swav.py", *FLAGS, "--batch_size", "16", "--dump_path", str(tmp_path)).wait()
    told = [line for line in printed.splitlines() if "the report is not whole" in line]
    assert codes == [0] and len(told) == 1 and "could not be written" in told[0], printed


def endless(folder: Path) -> Path:
    """A run directory that can be opened and never read."""
    write_run(folder)
    (folder / "run.json").unlink()
    os.mkfifo(folder / "run.json")
    return folder


def processes(folder: Path) -> list[str]:
    """Processes that make the page of a run directory."""
    words = f"clusterssl[.]closing {folder}"
    return subprocess.run(["pgrep", "-f", words], capture_output=True, text=True, check=False).stdout.split()


def test_a_page_that_takes_too_long_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = endless(tmp_path / "run")
    monkeypatch.setattr(closing, "LIMIT_S", 1.0)
    caplog.set_level(logging.INFO, "clusterssl.closing")
    began = time.monotonic()
    closing.close_with_page(run)
    assert time.monotonic() - began < 10 and not processes(run)
    assert [record.getMessage() for record in caplog.records] == [
        f"writing {run / 'report.html'}; Ctrl-C leaves it out",
        f"the report was left unfinished (after 1 s); python report.py {run} makes it again",
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_the_page_at_once(number: signal.Signals, tmp_path: Path) -> None:
    run = endless(tmp_path / "run")
    code = "import sys, pathlib; from clusterssl import closing as c; c.close_with_page(pathlib.Path(sys.argv[1]))"
    words = [sys.executable, "-c", code, str(run)]
    parent = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": str(ROOT / "src")})
    wait_for(lambda: bool(processes(run)))
    parent.send_signal(number)
    assert parent.wait(30) == (0 if number == signal.SIGTERM else -signal.SIGKILL)
    wait_for(lambda: not processes(run))


def wait_for(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_memory_is_bounded() -> None:
    code = "import os; from clusterssl import closing as c; c.MEMORY = 1 << 30; c.bound(os.getppid()); "
    code += "bytearray(1 << 28); bytearray(1 << 30)"
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.strip().endswith("MemoryError")
