"""Clusters of runs that still train, for the page that is served meanwhile: made now and then by a process of its own.

That process has one thread, low priority and no GPU, so that the training hardly notices it.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from clusterssl import child, closing
from clusterssl.report import Gallery, Strip

EVERY_S = 300.0
"""seconds at least between two looks at a run"""


class Look(NamedTuple):
    """What was made of a run."""

    began: float
    """time.monotonic()"""
    checkpoint: float
    """when it was written, seconds since 1970"""
    galleries: list[Gallery]


class Growing:
    """Galleries of some runs, made one after the other; `now` never waits. To be used in a `with` block.

    Args:
        runs: run directories.
    """

    def __init__(self, runs: Sequence[Path]) -> None:
        self.runs = list(runs)
        self._looks: dict[Path, Look] = {}
        self._maker: tuple[Path, Look, subprocess.Popen[bytes], IO[bytes]] | None = None

    def __enter__(self) -> Growing:
        return self

    def __exit__(self, *_: object) -> None:
        if self._maker is not None:
            self._maker[2].kill()
            self._maker[2].wait()

    def now(self) -> tuple[str, list[Gallery]]:
        """What is to be said of the pictures, and those that are made; begins to make what is due."""
        self._collect()
        if self._maker is None:
            self._begin()
        told = "; ".join(f"{run.resolve().name}: {self._said(run)}" for run in self.runs)
        lead = f"Pictures of clusters: {told}." if told else ""
        return lead, [one for look in self._looks.values() for one in look.galleries]

    def _said(self, run: Path) -> str:
        look = self._looks.get(run)
        if look is None:
            return "being made" if written(run) else "they come with the first checkpoint"
        if not look.galleries:
            return "none: images or checkpoint are out of reach or too large, or the machine was too busy"
        at = datetime.datetime.fromtimestamp(look.checkpoint).astimezone()
        return f"as of the checkpoint of {at:%H:%M:%S}, looked at every {EVERY_S / 60:.0f} minutes at most"

    def _begin(self) -> None:
        """Begin with the run that was looked at longest ago, of those that have a newer checkpoint."""
        now, due = time.monotonic(), []
        for run in self.runs:
            last, checkpoint = self._looks.get(run), written(run)
            if checkpoint and (last is None or (last.checkpoint < checkpoint and now - last.began >= EVERY_S)):
                due.append((last.began if last else 0.0, str(run), run, checkpoint))
        if not due:
            return
        _, _, run, checkpoint = min(due)
        said = tempfile.TemporaryFile()  # noqa: SIM115  # closed when it is read
        words = [sys.executable, "-m", "clusterssl.growing", str(run), str(os.getpid())]
        maker = subprocess.Popen(
            words, env=child.environment(), stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.DEVNULL
        )
        self._maker = run, Look(now, checkpoint, []), maker, said

    def _collect(self) -> None:
        if self._maker is None or self._maker[2].poll() is None:
            return
        run, look, maker, said = self._maker
        with said:
            said.seek(0)
            found = said.read()
        self._maker = None
        made = [_gallery(one, run) for one in json.loads(found)] if maker.returncode == 0 else []
        self._looks[run] = look._replace(galleries=made)


def written(run: Path) -> float:
    """When a run's checkpoint was written, 0 where there is none."""
    try:
        return (run / closing.CHECKPOINT).stat().st_mtime
    except OSError:
        return 0.0


def _gallery(kept: dict[str, Any], run: Path) -> Gallery:
    return Gallery(**{**kept, "run": run, "strips": tuple(Strip(*strip) for strip in kept["strips"])})


def main() -> None:
    """Write the galleries of a run to the standard output as JSON."""
    run = Path(sys.argv[1])
    closing.bound(int(sys.argv[2]))
    os.nice(5)
    if (run / closing.CHECKPOINT).stat().st_size > closing.LARGEST_CHECKPOINT:
        sys.exit("the checkpoint is too large")
    import torch

    from clusterssl.labelling.sample import run_galleries

    torch.set_num_threads(1)
    galleries = run_galleries(run, seconds=closing.READING_S)
    json.dump([dataclasses.asdict(dataclasses.replace(one, run=None)) for one in galleries], sys.stdout)


if __name__ == "__main__":
    main()
