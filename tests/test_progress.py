"""What a run says about waiting for its data."""

from __future__ import annotations

import fcntl
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from clusterssl.dist import World
from clusterssl.progress import Progress
from tests.launch import ROOT, TINY, metrics

ALONE = World()


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def run(clock: Clock, waits: list[float], world: World = ALONE, steps: int = 5) -> list[float]:
    """Intervals of ten seconds, of which so many are waited for data; returns the shares that are logged."""

    def batches() -> Iterator[int]:
        for wait in waits:
            for step in range(steps):
                clock.now += wait / steps
                yield step

    progress = Progress(1000, 0, 8, world, lambda: "turn this knob")
    logged = []
    for number, _ in enumerate(progress.timed(batches()), start=1):
        clock.now += (10 - waits[(number - 1) // steps]) / steps
        if number % steps == 0:
            logged.append(progress.rates(number)["data_wait"])
    return logged


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_long_waits_are_told_once_with_the_knob(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    shares = run(clock, [9.0, *[2.0] * 12])
    assert shares[0] == pytest.approx(0.9) and shares[1] == pytest.approx(0.2)
    assert warnings(caplog) == ["20 % of the time goes into waiting for data: turn this knob"]


@pytest.mark.parametrize("waits", [[9.0, *[0.9] * 12], [9.0, 9.0, 0.5]])
def test_short_waits_and_short_runs_are_not(waits: list[float], clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    run(clock, waits)
    assert warnings(caplog) == []


def test_later_waits_are_told_too(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    run(clock, [*[0.1] * 7, *[4.0] * 6])
    assert len(warnings(caplog)) == 1


def test_one_rank_speaks(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    run(clock, [9.0, *[2.0] * 12], World(rank=1, size=2))
    assert warnings(caplog) == []


def on_terminal(*words: str) -> str:
    """What a terminal of 120 columns receives from a command that ends well."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, *words], stdin=its, stdout=its, stderr=its, env=env)
    os.close(its)
    heard = b""
    try:
        while part := os.read(ours, 65536):
            heard += part
    except OSError:  # nobody holds the other end any more
        pass
    os.close(ours)
    assert process.wait(60) == 0, heard.decode()
    return heard.decode()


def test_a_terminal_shows_a_row_each_epoch(tmp_path: Path) -> None:
    words = [str(ROOT / "main_swav.py"), *TINY, "--batch_size", "16", "--dump_path", str(tmp_path)]
    heard = on_terminal(*words)
    lines = [line.strip() for line in re.split(r"[\r\n]+|\x1b\[A", heard)]
    head = ["epoch", "loss", "lr", "occupied", "images/s", "wait", "to", "go"]
    heads = [at for at, line in enumerate(lines) if line.split() == head]
    rows = [line.split() for line in lines if re.match(r"\d+ +\d+\.\d{4} ", line)]
    assert len(heads) == 1 and [row[0] for row in rows] == ["0", "1", "2", "3"], heard
    ended = [record for record in metrics(tmp_path) if "epoch_end" in record]
    for row, record in zip(rows, ended, strict=True):
        assert row[1] == f"{record['loss']:.4f}"
        assert row[3] == f"{sum(count > 0 for count in record['occupancy'])}/12"
        assert float(row[4]) > 0 and row[5].endswith("%")
    assert rows[-1][6:] == ["0", "s"]


def test_the_table_is_of_whole_epochs(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    progress = Progress(20, 0, 8, ALONE)
    written: list[str] = []

    class Bar:
        def update(self) -> None: ...
        def write(self, text: str, file: object) -> None:
            written.append(text)

    progress._bar = Bar()  # type: ignore[assignment]

    def batches() -> Iterator[int]:
        for step in range(20):
            clock.now += 0.5
            yield step

    for number, _ in enumerate(progress.timed(batches()), start=1):
        clock.now += 1.5
        if number % 3 == 0:
            progress.rates(number)
        if number % 10 == 0:
            progress.row(number // 10 - 1, number, 2.5, 0.003, [3, 0, 1, 0])
    assert [line.split() for line in written[1:]] == [
        ["0", "2.5000", "0.003", "2/4", "4", "25%", "20", "s"],
        ["1", "2.5000", "0.003", "2/4", "4", "25%", "0", "s"],
    ]


@pytest.mark.parametrize("steps", [5, 1])
def test_the_first_steps_of_a_start_foretell_nothing(steps: int, clock: Clock) -> None:
    progress = Progress(1000, 400, 8, ALONE)
    shown: dict[int, tuple[float, str]] = {}

    def batches() -> Iterator[int]:
        for step in range(401, 421):
            clock.now += 30 if step == 401 else 0.5
            yield step

    for step in progress.timed(batches()):
        clock.now += 120 if step == 401 else 1.5
        if step % steps == 0:
            shown[step] = (progress.rates(step)["images_per_s"], progress._to_go(step))
    if steps == 1:
        assert shown.pop(401) == (round(8 / 150, 1), "?")
        assert shown.pop(402)[0] == 4
    assert {step: speed for step, (speed, _) in shown.items()} == dict.fromkeys(shown, 4)
    assert {step: left for step, (_, left) in shown.items()} == {
        step: f"{(1000 - step) * 2 // 60} min {(1000 - step) * 2 % 60} s" for step in shown
    }
