"""After a power cut at any moment the newest promised checkpoint is there, whole, and the run goes on from it."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from clusterssl.dist import World
from clusterssl.errors import UserError
from clusterssl.files import read_checkpoint
from clusterssl.run import Run
from tests.chaos.disk import Recorder, lay_out, power_cuts
from tests.launch import metrics

RANKS, STEPS = 2, 3


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


def open_run(folder: Path, rank: int = 0) -> Run:
    """A start of a run by one of two ranks, which need not meet to save and to load."""
    run = Run(folder, World(rank, RANKS))
    if rank == 0:
        run.open("power", {}, {}, frozenset())
    return run


def save(runs: list[Run], step: int) -> None:
    """A checkpoint of both ranks; every second one is kept."""
    runs[0].log({"step": step})
    for rank in reversed(range(RANKS)):  # rank 0 writes what is shared, after all parts
        rows = torch.full((3,), float(10 * step + rank))
        keep_as = f"ckp-{step}.pth" if step % 2 == 0 else ""
        runs[rank].save({"weight": torch.full((5,), float(step))}, {"rows": rows}, step=step, keep_as=keep_as)


def close(runs: list[Run]) -> None:
    for run in runs:
        run.close()


def record(root: Path) -> Recorder:
    """The operations of a run that saves after every step, each marked when `save` has returned."""
    root.mkdir()
    with Recorder(root) as recorder:
        runs = [open_run(root / "run", rank) for rank in range(RANKS)]
        for step in range(1, STEPS + 1):
            save(runs, step)
            recorder.mark(step)
        close(runs)
    return recorder


def problem(folder: Path, promised: list[int], coming: int | None) -> str:
    """What is wrong with a run directory after a power cut; empty if nothing is."""
    allowed = {promised[-1] if promised else None, coming}
    for rank in range(RANKS):
        try:
            state = Run(folder, World(rank, RANKS)).load() if folder.exists() else None
        except UserError as error:
            return str(error)
        step = state["step"] if state else None
        if step not in allowed:
            return f"rank {rank} loads step {step}, {promised} were promised"
        if state and not (_all(state["weight"], step) and _all(state["sharded"]["rows"], 10 * step + rank)):
            return f"rank {rank} loads garbage for step {step}"
    for path in sorted((folder / "checkpoints").glob("*.pth")):
        if not _all(read_checkpoint(path)["weight"], int(path.stem[4:])):
            return f"{path.name} holds garbage"
    lost = set(promised) - {record["step"] for record in metrics(folder)}
    kept = {path.name for path in (folder / "checkpoints").glob("*.pth")}
    absent = {f"ckp-{step}.pth" for step in promised if step % 2 == 0} - kept
    return f"lost records {lost}" if lost else f"lost copies {absent}" if absent else ""


def _all(values: torch.Tensor, number: int | None) -> bool:
    return number is not None and bool((values == float(number)).all())


def problems(recorder: Recorder, scratch: Path) -> tuple[list[str], int]:
    """What is wrong after power cuts, and how many were tried."""
    found, tried = [], 0
    for promised, coming, state in power_cuts(recorder):
        lay_out(state, scratch)
        tried += 1
        try:
            wrong = problem(scratch / "run", promised, coming)
        except UserError as error:
            wrong = str(error)
        found += [f"promised {promised}: {wrong}"] if wrong else []
    return found, tried


def no_links(*names: Any, **more: Any) -> None:
    raise OSError(errno.EPERM, "no hard links here")


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
