"""A run that saves while its disk is watched, and what is wrong with what a power cut leaves of it."""

from __future__ import annotations

import itertools
from pathlib import Path
from unittest.mock import patch

import torch
from torch.distributed import HashStore

from clusterssl import dist, saving
from clusterssl.dist import World
from clusterssl.errors import UserError
from clusterssl.files import read_checkpoint
from clusterssl.run import Run
from tests.chaos.disk import Recorder, lay_out, power_cuts
from tests.launch import metrics

RANKS, STEPS = 2, 3


def open_run(folder: Path, rank: int = 0) -> Run:
    """A start of a run by one of two ranks, which need not meet to save and to load."""
    run = Run(folder, World(rank, RANKS))
    if rank == 0:
        run.open("power", {}, {}, frozenset())
    return run


def save(runs: list[Run], step: int) -> None:
    """A checkpoint of both ranks; every second one is kept."""
    runs[0].log({"step": step})
    together = HashStore()  # ranks of one process share the store they would have met with, and count alike
    with patch.object(dist, "store", lambda: together), patch.object(saving, "_numbers", itertools.repeat(step)):
        _save(runs, step)


def _save(runs: list[Run], step: int) -> None:
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
    allowed = {promised[-1] if promised else None} | ({coming} if coming is not None else set())
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
