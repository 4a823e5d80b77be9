"""The demo as a user runs it, with one short training."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def demo(folder: Path, *words: str) -> list[str]:
    command = [sys.executable, str(ROOT / "scripts" / "demo.py"), "--folder", str(folder), "--split", "val"]
    return [*command, "--seeds", "5", *words]


@pytest.mark.slow
def test_demo_shows_writes_and_reuses(tmp_path: Path) -> None:
    first = subprocess.run(demo(tmp_path / "d", "--epochs", "4"), capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    for part in ("raw pixels", "untrained", "pretrained", "no argument", "10 labels a class", "torch.hub.load"):
        assert part in first.stdout, part
    page = (tmp_path / "d" / "report.html").read_text(encoding="utf-8")
    assert "Every seed and reading" in page and page.count("data:image/png") == 10
    assert len(page) < 5_000_000
    steps = (tmp_path / "d" / "seed-5" / "metrics.jsonl").read_text()
    again = subprocess.run(demo(tmp_path / "d", "--epochs", "4"), capture_output=True, text=True, check=False)
    assert again.returncode == 0 and "already trained" in again.stdout
    assert (tmp_path / "d" / "seed-5" / "metrics.jsonl").read_text() == steps


def hear_ctrl_c() -> None:
    """As a shell's job in the foreground does, whatever these tests run under."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
def test_interrupted_demo_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "d" / "seed-5"
    started = subprocess.Popen(
        demo(tmp_path / "d", "--epochs", "60"), stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=hear_ctrl_c,
    )  # fmt: skip
    for _ in range(600):
        if (run / "checkpoint.pth.tar").exists():
            break
        time.sleep(0.2)
    os.killpg(started.pid, signal.SIGINT)
    _, errors = started.communicate(timeout=120)
    assert started.returncode == 130 and "interrupted" in errors and "Traceback" not in errors
    resumed = subprocess.Popen(
        demo(tmp_path / "d", "--epochs", "60"), stdout=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=hear_ctrl_c,
    )  # fmt: skip
    assert resumed.stdout is not None
    assert any("resuming at epoch" in line for line in resumed.stdout)
    os.killpg(resumed.pid, signal.SIGINT)
    resumed.communicate(timeout=120)


def test_bad_flags_end_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run(demo(tmp_path / "d", "--seed", "1"), capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "did you mean --seeds" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "d").exists()
