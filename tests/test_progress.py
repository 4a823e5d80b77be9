"""What a run says about waiting for its data."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import pytest

from clusterssl.dist import World
from clusterssl.progress import Progress

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
