"""After a power cut at any moment the newest promised checkpoint is there, whole, and the run goes on from it."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clusterssl.dist import World
from clusterssl.run import Run
from tests.chaos.disk import Recorder, lay_out, power_cuts
from tests.chaos.power import RANKS, STEPS, close, open_run, problem, problems, record, save


@pytest.fixture(autouse=True)
def own_log() -> Iterator[None]:
    """Runs opened here add files to the package's log; they go with the test."""
    package = logging.getLogger("clusterssl")
    before = list(package.handlers)
    logging.disable()
    yield
    logging.disable(logging.NOTSET)
    for handler in set(package.handlers) - set(before):
        package.removeHandler(handler)
        handler.close()


def without_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without hard links."""

    def refuse(*names: Any, **more: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
def test_loads_what_was_promised(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not links:
        without_links(monkeypatch)
    found, tried = problems(record(tmp_path / "root"), tmp_path / "cut")
    assert tried > 100
    assert not found, f"{len(found)} of {tried}: {sorted(set(found))}"


def test_goes_on_after_any_cut(tmp_path: Path) -> None:
    """Started again, the run cleans up, saves, and loads what it saved."""
    states = list(power_cuts(record(tmp_path / "root")))
    for promised, _, state in states[:: len(states) // 12]:
        lay_out(state, tmp_path / "cut")
        runs = [open_run(tmp_path / "cut" / "run", rank) for rank in range(RANKS)]
        for run in runs:
            run.load()
        save(runs, STEPS + 1)
        close(runs)
        assert not problem(tmp_path / "cut" / "run", [*promised, STEPS + 1], None)
        assert not list((tmp_path / "cut").rglob("*.tmp"))


def test_a_damaged_checkpoint_never_replaces_the_one_before(tmp_path: Path) -> None:
    """A run that fell back saves again: whenever that is cut short, the one before or the new one is there."""
    record(tmp_path / "root")
    current = tmp_path / "root" / "run" / "checkpoint.pth.tar"
    whole = current.read_bytes()
    current.unlink()  # it may be a hard link
    current.write_bytes(whole[: len(whole) // 2])
    with Recorder(tmp_path / "root") as recorder:
        recorder.mark(STEPS - 1)
        runs = [Run(tmp_path / "root" / "run", World(rank, RANKS)) for rank in range(RANKS)]
        for run in runs:
            assert (run.load() or {})["step"] == STEPS - 1
        save(runs, STEPS)
        recorder.mark(STEPS)
        close(runs)
    found, tried = problems(recorder, tmp_path / "cut")
    assert tried > 20
    assert not found, f"{len(found)} of {tried}: {sorted(set(found))}"


def test_files_that_are_not_synced_are_found_out(tmp_path: Path) -> None:
    """The simulation sees what it is there for."""
    with Recorder(tmp_path) as recorder:
        (tmp_path / "aside").write_bytes(b"new")
        (tmp_path / "aside").replace(tmp_path / "file")
        recorder.mark("written")
    states = [state for marks, _, state in power_cuts(recorder) if marks]
    for data in (b"new", b"", b"n", bytes(3)):
        assert {"file": data} in states and {"aside": data} in states
    assert {} in states and {"aside": b"new", "file": b"new"} not in states
