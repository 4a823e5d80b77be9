"""What a run directory says about its run, read so that a crash in the middle of a line does no harm."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clusterssl.errors import UserError

_SHOWN = 4


@dataclass(frozen=True)
class RunRecord:
    """One run: who it was (`about`), its training steps in order, its epochs, evaluations and starts."""

    path: Path
    name: str
    about: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    launches: list[dict[str, Any]] = field(default_factory=list)

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and finite values of one quantity."""
        pairs = [(float(record["step"]), record[key]) for record in self.steps if is_number(record.get(key))]
        return [step for step, _ in pairs], [float(value) for _, value in pairs]

    def last(self, key: str) -> float | None:
        """The last finite value of one quantity, None if there is none."""
        values = self.curve(key)[1]
        return values[-1] if values else None

    def occupancy(self) -> list[int]:
        """Hard assignments per prototype in the last complete epoch that counted them; empty if none did."""
        for record in reversed(self.epochs):
            counts = record.get("occupancy")
            if isinstance(counts, list) and counts and all(is_number(count) for count in counts):
                return [int(count) for count in counts]
        return []


def is_number(value: Any) -> bool:
    """Whether a value of a record is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def read_run(path: Path) -> RunRecord:
    """Read a run directory.

    Raises:
        UserError: no such directory, or one in which no run of ours has written anything.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such run directory; give a folder that a training wrote (--dump_path)")
    about, records = read_json(path / "run.json"), read_lines(path / "metrics.jsonl")
    if not about and not any({"step", "epoch_end", "eval"} & record.keys() for record in records):
        raise UserError(f"{path}: {_no_run(path)}; check the path")
    ended = {record["epoch_end"]: record for record in records if is_number(record.get("epoch_end"))}
    steps = {
        record["step"]: record
        for record in records
        if is_number(record.get("step")) and "epoch_end" not in record and "eval" not in record
    }
    return RunRecord(
        path=path,
        name=path.resolve().name,
        about=about,
        steps=[steps[step] for step in sorted(steps)],
        epochs=[ended[epoch] for epoch in sorted(ended)],
        evaluations=[record for record in [*_evaluations(path), *records] if "eval" in record],
        launches=read_lines(path / "launches.jsonl"),
    )


def _no_run(folder: Path) -> str:
    """What a directory without a run holds, in words."""
    inside = sorted(entry.name for entry in folder.iterdir())
    if not inside:
        return "is empty, no run was written here"
    names = ", ".join(inside[:_SHOWN]) + (" ..." if len(inside) > _SHOWN else "")
    return f"holds no run.json or metrics.jsonl of ours but {names}, so no run of ours was written here"


def _evaluations(path: Path) -> list[dict[str, Any]]:
    """What was written into the run directory itself and into folders of evaluations below it."""
    files = [path / "evaluations.jsonl", *sorted(path.glob("*/evaluations.jsonl"))]
    return [record for file in files for record in read_lines(file)]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty where there is none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file of lines; a line that a crash cut short is left out."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return []
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records
