"""What a run directory is, in one line."""

from __future__ import annotations

from clusterssl.report.records import RunRecord
from clusterssl.report.verdict import planned_steps, verdict


def state(run: RunRecord, now: float, largest: float | None = None) -> str:
    """Whether a run is finished, stopped or has only begun, and whether it learned.

    Args:
        run: as read from its directory.
        now: seconds since 1970.
        largest: see `verdict`.
    """
    if not run.steps:
        return f"{run.name}: begun, no step is logged yet"
    step, total = int(run.steps[-1]["step"]), planned_steps(run)
    if total and step >= total:
        how = f"finished after {step} steps"
    else:
        minutes = max(now - float(run.steps[-1].get("time", now)), 0) / 60
        of = f" of {total}" if total else ""
        how = (
            f"at step {step}{of}, last sign {minutes:.0f} min ago: it runs, or was stopped and the same command goes on"
        )
    bad = [remark.text.split(": ")[0].rstrip(".") for remark in verdict(run, largest) if remark.kind == "bad"]
    return f"{run.name}: {how}" + (f"; COLLAPSED or not learning: {'; '.join(bad)}" if bad else "")
