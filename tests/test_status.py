"""How runs stand, read from their directories."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clusterssl.errors import UserError
from clusterssl.report.records import read_run
from clusterssl.status import find_runs, status
from tests.launch import TINY, Launched


def written(folder: Path, steps: int) -> Path:
    """A run of 40 steps that has come so far."""
    folder.mkdir(parents=True)
    about = {"method": "swav", "config": {"epochs": 4}, "facts": {"global_batch": 16, "steps_per_epoch": 10}}
    (folder / "run.json").write_text(json.dumps(about))
    (folder / "launches.jsonl").write_text('{"time": 1000.0}\n{"time": 1500.0}\n')
    records = [
        {"time": 1500.0 + step, "epoch": (step - 1) // 10, "step": step, "loss": 3 - step / 100, "images_per_s": 32.0,
         "data_wait": 0.25}
        for step in range(1, steps + 1)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_says_how_far_and_how_long(tmp_path: Path) -> None:
    row = status(read_run(written(tmp_path / "a", 25)), now=1600.0)
    assert row["step"] == "25/40" and row["epoch"] == "2" and row["loss"] == "2.7500" and row["starts"] == "2"
    assert row["to go"] == "8 s" and row["data wait"] == "25 %" and row["last sign"] == "1 min 15 s ago"
    assert status(read_run(written(tmp_path / "b", 40)), now=1600.0)["last sign"] == "finished"
    assert status(read_run(written(tmp_path / "c", 0)), now=1600.0)["last sign"] == "1 min 40 s ago"


def test_finds_runs_in_a_folder_and_refuses_others(tmp_path: Path) -> None:
    runs = [written(tmp_path / "all" / name, 3) for name in "ab"]
    assert find_runs([str(tmp_path / "all"), str(runs[1])]) == [*runs, runs[1]]
    with pytest.raises(UserError, match="neither a run directory"):
        find_runs([str(tmp_path)])


def test_a_real_run(tmp_path: Path) -> None:
    codes, printed = Launched("main_swav.py", *TINY, "--batch_size", "16", "--dump_path", str(tmp_path / "r")).wait()
    assert codes == [0], printed
    codes, printed = Launched("scripts/status.py", str(tmp_path / "r")).wait()
    assert codes == [0] and "24/24" in printed and "finished" in printed and "swav" in printed


def test_a_foreign_folder_does_not_hide_the_others(tmp_path: Path) -> None:
    written(tmp_path / "mine", 3)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "run.json").write_text("[1]")
    codes, printed = Launched("scripts/status.py", str(tmp_path)).wait()
    assert codes == [2] and "mine" in printed and "no run of ours was written here" in printed
