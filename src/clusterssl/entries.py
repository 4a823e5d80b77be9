"""The records of metrics.jsonl as numbers by name and step, as loggers want them."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Entry(NamedTuple):
    """One record."""

    step: int
    values: dict[str, float]
    """by name, e.g. train/loss"""
    counts: dict[str, list[int]]
    """lists of numbers, to be shown as histograms"""
    time: float
    """seconds since 1970"""


def entries_of(metrics: Path, last: int) -> list[Entry]:
    """What the records of a metrics file say up to a step, in order; of a step that came again the last time."""
    found: dict[tuple[bool, int], Entry] = {}
    step = 0
    with metrics.open("rb") as lines:
        for line in lines:
            with contextlib.suppress(ValueError):  # a kill may have cut it
                record = json.loads(line)
                step = step_of(record, step)
                found[("epoch_end" in record, step)] = entry_of(record, step)
    return sorted((entry for entry in found.values() if entry.step <= last), key=lambda entry: entry.time)


def step_of(record: dict[str, Any], before: int) -> int:
    """Evaluations count epochs; the record of an epoch's end has the step of the record before."""
    return record.get("step", record.get("epoch", before))


def entry_of(record: dict[str, Any], step: int) -> Entry:
    """A record of training or of an epoch's end; what are no numbers, and epoch and step themselves, are left out."""
    group = "epoch" if "epoch_end" in record else "train"
    kept = {key: value for key, value in record.items() if key not in ("epoch", "epoch_end", "step", "time")}
    named = dict(_flat(kept, group))
    values = {name: float(value) for name, value in named.items() if isinstance(value, (int, float))}
    counts = {name: value for name, value in named.items() if isinstance(value, list) and value}
    if record.get("occupancy"):
        values["epoch/occupied"] = sum(count > 0 for count in record["occupancy"]) / len(record["occupancy"])
    return Entry(step, values, counts, record.get("time", time.time()))


def _flat(record: dict[str, Any], group: str) -> Iterator[tuple[str, Any]]:
    """Values of a record and of the records in it by their whole names, e.g. train/layers/conv1/top1."""
    for key, value in record.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{group}/{key}")
        else:
            yield f"{group}/{key}", value
