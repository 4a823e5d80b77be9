"""How runs stand, from their directories alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from clusterssl.errors import UserError
from clusterssl.progress import duration
from clusterssl.report.records import RunRecord

COLUMNS = ("run", "method", "epoch", "step", "done", "loss", "images/s", "data wait", "to go", "starts", "last sign")
_RECENT = 20
"""records of which the median speed counts"""


def status(run: RunRecord, now: float) -> dict[str, str]:
    """One row of the table, keyed by column.

    Args:
        run: as read from its directory.
        now: seconds since 1970.
    """
    config, facts = run.about.get("config", {}), run.about.get("facts", {})
    last = run.steps[-1] if run.steps else {}
    step, per_epoch = int(last.get("step", 0)), facts.get("steps_per_epoch")
    total = per_epoch * config["epochs"] if per_epoch and "epochs" in config else None
    speed = median(record.get("images_per_s", 0.0) for record in run.steps[-_RECENT:]) if run.steps else 0.0
    loss = run.last("loss")
    left = (total - step) * facts.get("global_batch", 0) / speed if total and speed else math.nan
    shown = {
        "run": run.name,
        "method": str(run.about.get("method", "?")),
        "epoch": str(last.get("epoch", "-")),
        "step": f"{step}/{total}" if total else str(step),
        "done": f"{100 * step / total:.0f} %" if total else "?",
        "loss": "-" if loss is None else f"{loss:.4f}",
        "images/s": f"{speed:.0f}" if run.steps else "-",
        "data wait": f"{100 * last['data_wait']:.0f} %" if "data_wait" in last else "-",
        "to go": "-" if math.isnan(left) or step == total else duration(left),
        "starts": str(len(run.launches)),
    }
    heard = max((record.get("time", 0.0) for record in [last, *run.launches[-1:]]), default=0.0)
    ended = total is not None and step >= total
    return {**shown, "last sign": "finished" if ended else f"{duration(max(now - heard, 0))} ago" if heard else "-"}


def find_runs(paths: Sequence[str]) -> list[Path]:
    """Run directories named, or lying directly in a folder named.

    Raises:
        UserError: a path is no run and holds none.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        inside = sorted(record.parent for record in path.glob("*/run.json"))
        if not (path / "run.json").exists() and not inside:
            raise UserError(f"{path}: neither a run directory nor a folder of them; give what --dump_path was")
        found += [path] if (path / "run.json").exists() else inside
    return found


def table(rows: Sequence[dict[str, str]]) -> str:
    """The rows under their names, in columns."""
    widths = [max(len(name), *(len(row[name]) for row in rows)) for name in COLUMNS]
    lines = [dict(zip(COLUMNS, COLUMNS, strict=True)), *rows]
    return "\n".join(
        "  ".join(line[name].ljust(width) for name, width in zip(COLUMNS, widths, strict=True)).rstrip()
        for line in lines
    )
