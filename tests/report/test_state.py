"""One line about a run directory, whatever it is."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from clusterssl.errors import UserError
from clusterssl.report import read_run
from clusterssl.report.state import state
from tests.report.runs import write_run

NOW = 1.7e9 + 59 + 300
"""five minutes after the last of 60 steps"""


def test_finished_stopped_and_collapsed(tmp_path: Path) -> None:
    facts = {"steps_per_epoch": 30}
    finished = read_run(write_run(tmp_path / "a", facts={"steps_per_epoch": 29}))
    assert state(finished, NOW) == "a: finished after 59 steps"
    stopped = read_run(write_run(tmp_path / "b", facts=facts))
    assert state(stopped, NOW).startswith("b: at step 59 of 60, last sign 5 min ago: it runs, or was stopped")
    flat = [math.log(30)] * 60
    collapsed = state(read_run(write_run(tmp_path / "c", facts={"steps_per_epoch": 29}, curve=flat)), NOW)
    assert collapsed.startswith("c: finished after 59 steps; COLLAPSED or not learning: The loss is 3.401")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "run.json").write_text('{"method": "swav", "config": null}')
    assert state(read_run(tmp_path / "d"), NOW) == "d: begun, no step is logged yet"
    assert all("\n" not in line for line in (collapsed, state(stopped, NOW)))


def test_empty_and_foreign(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: is empty, no run was written here"):
        read_run(tmp_path / "empty")
    (tmp_path / "foreign").mkdir()
    for name in "abcde":
        (tmp_path / "foreign" / name).touch()
    with pytest.raises(UserError, match=r"but a, b, c, d \.\.\., so no run of ours"):
        read_run(tmp_path / "foreign")
    for name, text in (("run.json", "[1]"), ("metrics.jsonl", '{"a": 1}\n')):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(text)
        with pytest.raises(UserError, match=f"of ours but {name}, so no run of ours"):
            read_run(tmp_path / name)
