"""Pictures of a run's clusters while it trains: made beside the page, anew for a newer checkpoint, never waited for."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from clusterssl import growing
from clusterssl.growing import Growing
from clusterssl.labelling.sample import run_galleries
from clusterssl.report import Gallery
from tests.evals.checkpoints import own_checkpoint
from tests.report.runs import write_run


def made(looks: Growing) -> list[Gallery]:
    """The pictures, as soon as nothing is under way."""
    end = time.monotonic() + 60
    looks.now()
    while looks._maker is not None:
        assert time.monotonic() < end
        time.sleep(0.05)
        looks._collect()
    return looks.now()[1]


def test_pictures_come_with_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run")
    with Growing([run]) as looks:
        assert looks.now() == ("Pictures of clusters: run: they come with the first checkpoint.", [])
        own_checkpoint(run / "checkpoint.pth.tar")
        began = time.monotonic()
        assert looks.now() == ("Pictures of clusters: run: being made.", []) and time.monotonic() - began < 1
        assert made(looks) == run_galleries(run)
        assert "as of the checkpoint of" in looks.now()[0]
        os.utime(run / "checkpoint.pth.tar", (2e9, 2e9))
        looks.now()
        assert looks._maker is None, "not more often than every few minutes"
        monkeypatch.setattr(growing, "EVERY_S", 0.0)
        looks.now()
        assert looks._maker is not None
        maker = looks._maker[2]
    assert maker.returncode is not None, "nothing is left running"


def test_what_cannot_be_shown_is_said(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "checkpoint.pth.tar").write_bytes(b"torn")
    with Growing([run]) as looks:
        assert made(looks) == [] and "run: none: images or checkpoint are out of reach" in looks.now()[0]
    with Growing([]) as looks:
        assert looks.now() == ("", [])
