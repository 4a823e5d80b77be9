"""Reading run directories, whole and damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clusterssl.errors import UserError
from clusterssl.report.records import read_run
from tests.report.runs import losses, write_lines, write_run


def test_reads_everything_a_run_writes(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    assert run.name == "run"
    assert run.curve("loss") == ([float(step) for step in range(60)], losses())
    assert run.last("ln_k") == pytest.approx(3.4012, abs=1e-4)
    assert run.last("nothing") is None
    assert len(run.occupancy()) == 30
    assert [record["top1"] for record in run.evaluations] == [95.25]
    assert len(run.launches) == 1 and run.about["method"] == "swav"


def test_after_a_resume_the_last_record_of_a_step_counts(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5, "loss": 99.0}) + "\n" + json.dumps({"epoch_end": 0, "occupancy": [1]}) + "\n")
    run = read_run(folder)
    steps, values = run.curve("loss")
    assert steps == sorted(steps) and len(steps) == 60 and values[5] == 99.0
    assert len(run.epochs) == 2 and run.epochs[0]["occupancy"] == [1] and len(run.occupancy()) == 30


def test_torn_foreign_and_non_finite_lines_do_no_harm(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    whole = [json.dumps({"step": step, "loss": 1.0 + step}) for step in range(3)]
    (folder / "metrics.jsonl").write_bytes(
        "\n".join([*whole, '{"step": 3, "loss": NaN}', "[1]", "", '{"step": 4, "lo']).encode() + b"\xff\xfe"
    )
    run = read_run(folder)
    assert [record["step"] for record in run.steps] == [0, 1, 2, 3]
    assert run.curve("loss")[1] == [1.0, 2.0, 3.0]


def test_a_damaged_run_json_still_gives_curves(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "run.json").write_text('{"argv": [')
    run = read_run(folder)
    assert run.about == {} and len(run.steps) == 60


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_what_is_no_run_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "run"
    if kind == "empty":
        path.mkdir()
    if kind == "file":
        write_lines(path, [{}])
    with pytest.raises(UserError, match="run") as error:
        read_run(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
