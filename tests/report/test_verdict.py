"""The words about a run agree with its numbers."""

from __future__ import annotations

import math
from pathlib import Path

from clusterssl.report.records import RunRecord, read_run
from clusterssl.report.verdict import verdict
from tests.report.runs import write_run


def test_a_run_that_learns_is_fine(tmp_path: Path) -> None:
    remarks = verdict(read_run(write_run(tmp_path / "run")))
    assert {remark.kind for remark in remarks} == {"good"}
    assert "44% below ln K = 3.401" in remarks[0].text
    assert "24 of 30 prototypes" in remarks[1].text


def test_a_collapsed_run_is_named(tmp_path: Path) -> None:
    remarks = verdict(read_run(write_run(tmp_path / "run", curve=[math.log(30)] * 40)))
    assert [remark.kind for remark in remarks] == ["bad", "bad", "bad", "good"]
    assert "--epsilon" in remarks[0].text


def test_one_lucky_step_at_the_end_is_not_learning(tmp_path: Path) -> None:
    curve = [*[math.log(30)] * 39, 1.0]
    assert verdict(read_run(write_run(tmp_path / "run", curve=curve)))[0].kind == "bad"


def test_waiting_for_data_and_restarts_are_said() -> None:
    steps = [{"step": at, "loss": 1.0, "images_per_s": 10.0, "data_wait": 0.6} for at in range(9)]
    run = RunRecord(Path("r"), "r", steps=steps, launches=[{}, {}])
    texts = " ".join(remark.text for remark in verdict(run))
    assert "--workers" in texts and "60%" in texts and "started 2 times" in texts


def test_no_steps_and_no_finite_loss() -> None:
    assert "No training step" in verdict(RunRecord(Path("r"), "r"))[0].text
    nan = RunRecord(Path("r"), "r", steps=[{"step": 0, "loss": math.nan}])
    assert verdict(nan)[0].kind == "bad"
