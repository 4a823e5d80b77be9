"""Copies of metrics.jsonl, read back with the packages that they are for, after kills and failures too."""

from __future__ import annotations

import importlib
import json
import logging
import os
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from clusterssl.entries import entry_of
from clusterssl.errors import UserError
from clusterssl.mirrors import Mirrors, require_packages
from tests.launch import ROOT, TINY, Launched, metrics, wait_for_step

FLAGS = [*TINY, "--batch_size", "16"]
STEPS_PER_EPOCH, EPOCHS = 16, 3
STEPS = EPOCHS * STEPS_PER_EPOCH


def expected(folder: Path, name: str, *, first: bool = False) -> dict[int, float]:
    """What the last (or first) record of each step in metrics.jsonl says."""
    records = metrics(folder)[:: -1 if first else 1]
    return {record["step"]: record[name] for record in records if "step" in record}


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard shows, by name and step; no step twice."""
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = reading.EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    events = {name: found.Scalars(name) for name in found.Tags()["scalars"]}
    for name, points in events.items():
        assert len({point.step for point in points}) == len(points), f"{name}: a step is there twice"
    return {name: {point.step: point.value for point in points} for name, points in events.items()}


def killed_and_resumed(folder: Path, *flags: str, ranks: int = 1) -> list[int]:
    """A run that was killed in its second epoch and ended after its third; the steps that were logged, in order."""
    words = [*TINY, "--data_path", "synthetic:256:24x24", "--batch_size", str(16 // ranks), *flags]
    words += ["--dump_path", str(folder), "--epochs"]
    launched = Launched("main_swav.py", *words, "400", ranks=ranks)
    wait_for_step(folder, STEPS_PER_EPOCH + 4, launched)
    launched.send(signal.SIGKILL)
    launched.wait()
    before = [record["step"] for record in metrics(folder) if "step" in record]
    codes, printed = Launched("main_swav.py", *words, str(EPOCHS), ranks=ranks).wait()
    assert codes == [0] * ranks, printed
    steps = [record["step"] for record in metrics(folder) if "step" in record]
    assert steps[len(before)] <= before[-1] < STEPS, "no step was repeated: nothing is tested"
    return steps


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_tensorboard_shows_what_metrics_hold_after_a_kill(ranks: int, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    killed_and_resumed(tmp_path, "--tensorboard", ranks=ranks)
    shown = scalars(tmp_path)
    for name in ("loss", "lr", "images_per_s", "data_wait", "perplexity", "rankme", "bad_images"):
        assert shown[f"train/{name}"] == pytest.approx(expected(tmp_path, name), rel=1e-6), name
    ended = {record["epoch_end"]: record for record in metrics(tmp_path) if "epoch_end" in record}
    assert shown["epoch/loss"] == pytest.approx(
        {(epoch + 1) * STEPS_PER_EPOCH: record["loss"] for epoch, record in ended.items()}, rel=1e-6
    )
    used = sum(count > 0 for count in ended[EPOCHS - 1]["occupancy"]) / 12
    assert shown["epoch/occupied"][STEPS] == pytest.approx(used)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1, "of one rank and the last start"


def test_tensorboard_is_filled_where_a_start_went_without_it(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    steps = [0]
    for epochs, flags in ((1, []), (2, ["--tensorboard"]), (3, []), (4, ["--tensorboard"]), (5, ["--tensorboard"])):
        words = [*FLAGS, *flags, "--epochs", str(epochs), "--dump_path", str(tmp_path)]
        codes, printed = Launched("main_swav.py", *words).wait()
        assert codes == [0], printed
        if flags:
            shown = scalars(tmp_path)
            assert shown["train/loss"] == pytest.approx(expected(tmp_path, "loss"), rel=1e-6)
            assert len(shown["epoch/loss"]) == epochs
            steps.append(len(shown["train/loss"]))
    assert steps == sorted(set(steps))
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def history(folder: Path) -> list[dict[str, Any]]:
    """The rows in wandb's offline files, in order of time; their frames are those of LevelDB's log."""
    messages = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    rows = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        data, at, text = path.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if 32768 - at % 32768 < 7:
                at += 32768 - at % 32768
                continue
            _, length, kind = struct.unpack("<IHB", data[at : at + 7])
            text, at = text + data[at + 7 : at + 7 + length], at + 7 + length
            if kind in (1, 4):
                record = messages.Record.FromString(text)
                items = {item.nested_key[0]: item.value_json for item in record.history.item}
                rows += [{name: json.loads(value) for name, value in items.items()}] if items else []
                text = b""
    return rows


@pytest.mark.slow
def test_wandb_continues_one_run_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    steps = killed_and_resumed(tmp_path, "--wandb")
    folders = sorted(path.name for path in tmp_path.glob("wandb/offline-run-*"))
    name = (tmp_path / "wandb.id").read_text()
    assert len(folders) == 2 and all(folder.endswith(f"-{name}") for folder in folders)
    rows = history(tmp_path)
    seen = [row["_step"] for row in rows]
    assert seen == sorted(set(seen)) and seen[-1] == STEPS, "no step twice, none goes back"
    repeated = next(at for at, step in enumerate(steps[1:], 1) if step <= steps[at - 1])
    assert set(range(steps[repeated - 1] + 1, STEPS + 1)) <= set(seen), "all that no earlier start had sent"
    losses = expected(tmp_path, "loss", first=True)
    assert {row["_step"]: row["train/loss"] for row in rows} == pytest.approx({step: losses[step] for step in seen})
    assert "epoch/loss" in rows[-1] and rows[-1]["epoch/occupied"] > 0


@pytest.mark.parametrize("script", ["eval_linear", "eval_semisup"])
def test_evaluations_that_train_are_copied(script: str, tmp_path: Path) -> None:
    words = ["--data_path", "digits", "--arch", "conv4w4", "--workers", "0", "--device", "cpu", "--epochs", "2"]
    words += {"eval_linear": ["--layers", "conv1", "conv4"], "eval_semisup": ["--labels_perc", "20"]}[script]
    for more in ([], ["--tensorboard"]):  # the second start has all to fill in
        codes, printed = Launched(f"{script}.py", *words, *more, "--dump_path", str(tmp_path)).wait()
        assert codes == [0] and "--tensorboard failed" not in printed, printed
    found, kept = scalars(tmp_path), metrics(tmp_path)
    assert [record["epoch"] for record in kept] == [1, 2]
    assert found["train/loss"] == pytest.approx({record["epoch"]: record["loss"] for record in kept})
    if script == "eval_linear":
        tops = {record["epoch"]: record["layers"]["conv1"]["top1"] for record in kept}
        assert found["train/layers/conv1/top1"] == pytest.approx(tops)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_an_absent_package_is_one_line_before_anything_begins(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(sys, "argv", ["main_swav.py", *FLAGS, f"--{name}", "--dump_path", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "main_swav.py"), run_name="__main__")
    printed = capsys.readouterr()
    assert ended.value.code == 2 and not (tmp_path / "run").exists() and printed.out == ""
    assert printed.err.splitlines() == [
        f"main_swav.py: error: --{name}: {name} is not installed; run pip install {name}, or leave the flag out"
    ]


def test_a_folder_of_that_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_mirror").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="some_mirror is not installed; run pip install some_mirror"):
        require_packages(["some_mirror"])
    (tmp_path / "some_mirror" / "__init__.py").touch()
    importlib.invalidate_caches()
    require_packages(["some_mirror"])


def test_a_broken_package_is_one_line_before_anything_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other_mirror").mkdir()
    (tmp_path / "other_mirror" / "__init__.py").write_text("raise TypeError('Descriptors cannot be created')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"other_mirror cannot be imported \(Descriptors cannot be created\); mend it"):
        require_packages(["other_mirror"])


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_folder_that_vanishes_costs_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("tensorboard")
    mirrors = Mirrors(tmp_path, ["tensorboard"])
    mirrors.start(0, {})
    mirrors.send({"epoch": 0, "step": 1, "loss": 0.5})
    wait_for(lambda: scalars(tmp_path).get("train/loss") == {1: 0.5})
    shutil.rmtree(tmp_path / "tensorboard")
    (tmp_path / "tensorboard").touch()
    for step in range(2, 200):
        mirrors.send({"epoch": 0, "step": step, "loss": 0.5})
    mirrors.close()
    wait_for(lambda: not any("_AsyncWriter" in type(thread).__name__ for thread in threading.enumerate()))
    assert len(told(caplog)) == 1 and "--tensorboard failed" in told(caplog)[0] and "Not a dir" in told(caplog)[0]


def wait_for(holds: Any) -> None:
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


class Stuck:
    """A mirror that never returns, as one on a file system that hangs."""

    def __init__(self, *_: Any) -> None: ...
    def catch_up(self) -> None: ...

    def write(self, entry: Any) -> None:
        time.sleep(3600)

    def close(self) -> None: ...


def test_a_stuck_mirror_holds_nothing_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("clusterssl.mirrors._MAKERS", {"wandb": Stuck})
    monkeypatch.setattr("clusterssl.mirrors._CLOSING_S", 0.2)
    mirrors = Mirrors(tmp_path, ["wandb"])
    mirrors.start(0, {})
    began = time.monotonic()
    for step in range(1, 3000):
        mirrors.send({"epoch": 0, "step": step, "loss": 0.5})
    mirrors.close()
    assert time.monotonic() - began < 5
    assert [line.split(":")[1].split(",")[0] for line in told(caplog)] == [
        " too slow",
        " not finished within 0 seconds",
    ]


KILLED = """
import logging, os, signal, subprocess, sys
from pathlib import Path
from clusterssl.mirrors import Mirrors
logging.basicConfig()
mirrors = Mirrors(Path(sys.argv[1]), ["wandb"])
mirrors.start(0, {})
mirrors.send({"epoch": 0, "step": 1, "loss": 0.5})
service = subprocess.run(["pgrep", "-P", str(os.getpid()), "wandb-core"], capture_output=True, text=True).stdout
os.kill(int(service), signal.SIGKILL)
for step in range(2, 100):
    mirrors.send({"epoch": 0, "step": step, "loss": 0.5})
mirrors.close()
print("trained to the end")
"""


def test_the_death_of_wandbs_service_costs_one_warning(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    env = {**os.environ, "WANDB_MODE": "offline", "PYTHONPATH": str(ROOT / "src")}
    words = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and done.stdout.endswith("trained to the end\n"), done.stderr
    assert done.stderr.count("--wandb failed") == 1


def test_a_mirror_that_cannot_begin_is_an_error_at_first_and_a_warning_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    flags = [*FLAGS, "--epochs", "1", "--dump_path", str(tmp_path)]
    codes, printed = Launched("main_swav.py", *flags, "--tensorboard").wait()
    assert codes == [2] and len([line for line in printed.splitlines() if "error: --tensorboard:" in line]) == 1
    assert Launched("main_swav.py", *flags).wait()[0] == [0], "the flag may go"
    codes, printed = Launched("main_swav.py", *flags, "--epochs", "2", "--tensorboard").wait()
    assert codes == [0] and printed.count("--tensorboard failed") == 1, printed


def test_what_is_copied_of_a_record() -> None:
    entry = entry_of({"time": 1.0, "epoch": 3, "step": 40, "loss": 2.5, "bad_images": 0}, 40)
    assert entry.values == {"train/loss": 2.5, "train/bad_images": 0.0} and not entry.counts
    entry = entry_of({"epoch_end": 3, "loss": 2.0, "occupancy": [4, 0, 1, 0]}, 40)
    assert entry.step == 40 and entry.values == {"epoch/loss": 2.0, "epoch/occupied": 0.5}
    assert entry.counts == {"epoch/occupancy": [4, 0, 1, 0]}
    assert entry_of({"epoch_end": 3, "loss": 2.0, "occupancy": []}, 40).values == {"epoch/loss": 2.0}
