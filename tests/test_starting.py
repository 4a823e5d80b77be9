"""Requests to stop that come before the first step."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from clusterssl import preemption, pulse
from clusterssl.errors import Stopped
from clusterssl.preemption import starting
from tests.launch import ROOT, TINY, Launched

LOOKING = "--auto_batch: looking for the largest batch"


def wait_for_line(launched: Launched, rank: int, words: str) -> None:
    end = time.monotonic() + 120
    process = launched.processes[rank]
    while words not in process.texts[0] and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)


def stopped(launched: Launched, number: signal.Signals, rank: int, folder: Path) -> str:
    """What was printed by a run of two ranks that a signal to one of them stopped before it began."""
    launched.send(number, rank)
    codes, printed = launched.wait()
    assert codes == [75, 75], printed
    assert "before the first step" in printed and not (folder / "run.json").exists()
    assert "Traceback" not in printed, printed
    return printed


@pytest.mark.parametrize(("number", "rank"), [(signal.SIGUSR1, 0), (signal.SIGTERM, 1)], ids=str)
def test_while_the_images_are_read_to_the_device(number: signal.Signals, rank: int, tmp_path: Path) -> None:
    words = [*TINY, "--cache", "device", "--batch_size", "8", "--dump_path", str(tmp_path)]
    launched = Launched("tests/slow_start.py", "0.5", str(ROOT / "main_swav.py"), *words, ranks=2)
    wait_for_line(launched, rank, "reading")
    printed = stopped(launched, number, rank, tmp_path)
    assert f"stopped by {number.name}" in printed and "--cache device: 96 images" not in printed


@pytest.mark.parametrize(("number", "rank"), [(signal.SIGTERM, 0), (signal.SIGUSR2, 1)], ids=str)
def test_while_the_batch_is_planned(number: signal.Signals, rank: int, tmp_path: Path) -> None:
    words = [*TINY, "--auto_batch", "--batch_size", "8", "--dump_path", str(tmp_path)]
    launched = Launched("main_swav.py", *words, ranks=2)
    wait_for_line(launched, 0, LOOKING)
    printed = stopped(launched, number, rank, tmp_path)
    assert LOOKING in printed and "--auto_batch: --batch_size" not in printed


def test_what_nobody_polled_for_is_heard_at_the_end_and_requeued(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(preemption, "_ask", lambda: asked.append("requeue"))
    before = {number: signal.getsignal(number) for number in preemption.STOP_SIGNALS}
    done = False
    try:
        with pytest.raises(Stopped, match="stopped by SIGUSR1 before the first step"), starting():
            os.kill(os.getpid(), signal.SIGUSR1)
            done = True
        assert done and asked == ["requeue"]
        with starting():
            pulse.poll("undisturbed")
        assert asked == ["requeue"]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
