"""Writes run directories as a training leaves them, for the tests of the report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def losses(steps: int = 60, prototypes: int = 30) -> list[float]:
    """A falling loss that starts at ln K, with a ripple."""
    return [math.log(prototypes) * (0.55 + 0.45 * math.exp(-at / 15)) + 0.02 * math.sin(at) for at in range(steps)]


def write_run(folder: Path, *, curve: list[float] | None = None, prototypes: int = 30, **about: Any) -> Path:
    """A run directory of two epochs whose loss is `curve`; `about` overrides fields of run.json."""
    folder.mkdir(parents=True)
    curve = losses(prototypes=prototypes) if curve is None else curve
    learns = curve[-1] < 0.9 * math.log(prototypes)
    records: list[dict[str, Any]] = [
        {
            "time": 1.7e9 + at, "epoch": at * 2 // len(curve), "step": at, "loss": loss, "lr": 0.003 * at / len(curve),
            "images_per_s": 900.0 + at, "data_wait": 0.05, "ln_k": math.log(prototypes),
            "perplexity": prototypes * 0.8 if learns else 1.2, "dead_share": 0.0 if learns else 0.9, "entropy": 1.1,
            "feature_std": 0.08, "rankme": 21.0 if learns else 1.1,
        }
        for at, loss in enumerate(curve)
    ]  # fmt: skip
    counts = [10 + (7 * at) % 13 for at in range(prototypes)]
    records += [{"epoch_end": epoch, "loss": curve[-1], "occupancy": counts} for epoch in (0, 1)]
    write_lines(folder / "metrics.jsonl", records)
    write_lines(folder / "launches.jsonl", [{"time": 1.7e9, "host": "here"}])
    write_lines(folder / "evaluations.jsonl", [{"eval": "knn", "k": 20, "top1": 95.25}])
    run = {
        "argv": ["main_swav.py"], "command": "python main_swav.py --epochs 2", "method": "swav", "world_size": 1,
        "config": {"epochs": 2, "nmb_crops": [2, 6], "data_path": "digits"}, "git": {"sha": "0" * 40, "dirty": False},
        "versions": {"torch": "2.6.0"}, "hosts": ["here"],
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps({**run, **about}))
    return folder


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
