"""The benches' flags, and comparisons of their results; `test_bench_page.py` reads the page."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clusterssl import config as cfg
from clusterssl.errors import UserError
from clusterssl.plan.blueprint import read_script

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "bench"


def result(ours: tuple[float, float, float], once: float = 2.0, cpu: str = "a") -> dict[str, Any]:
    """A result with a spread, one measured once, and a speed."""
    spread = dict(zip(("low", "median", "high"), ours, strict=True))
    rows = [{"batch": 8, "seconds": {"ours": spread}}, {"batch": 9, "seconds": {"ours": spread}}]
    found = {"rows": rows, "cpu_s": {"faiss": once}, "images_per_s": [10.0, 20.0, 40.0], "options": {"seconds": 7}}
    return {"hardware": {"cpu": cpu}, "date": "2024-02-03", "command": "python x.py", "result": found}


def compared(tmp_path: Path, old: dict[str, Any], new: dict[str, Any], *flags: str) -> tuple[int, str]:
    for name, record in (("old", old), ("new", new)):
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    words = [sys.executable, str(BENCH / "compare.py"), str(tmp_path / "old.json"), str(tmp_path / "new.json"), *flags]
    done = subprocess.run(words, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_times_are_found_in_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    figures = runpy.run_path(str(BENCH / "figures.py"))["figures"]
    found = {" / ".join(path): one for path, one in figures(result((1.0, 2.0, 3.0))["result"])}
    assert found["rows / batch 8 / seconds / ours"] == (2000, 1000, 3000)
    assert found["cpu_s / faiss"] == (2000, 2000, 2000)
    assert found["images_per_s"] == (50, 25, 100)
    assert len(found) == 4, "options are no times"


def test_only_what_exceeds_the_spread_is_slower(tmp_path: Path) -> None:
    base = result((0.9, 1.0, 1.1))
    code, said = compared(tmp_path, base, result((1.0, 1.15, 1.3)))
    assert code == 0 and "4 of 4 times compared, 0 of them changed" in said
    code, said = compared(tmp_path, base, result((1.2, 1.3, 1.4)))
    assert code == 1 and "slower: rows / batch 9 / seconds / ours: 1000 -> 1300 ms (1.30 x)" in said
    code, said = compared(tmp_path, base, result((0.5, 0.6, 0.7)))
    assert code == 0 and said.count("faster") == 2
    assert compared(tmp_path, base, result((0.9, 1.0, 1.1), once=2.3))[0] == 0
    assert compared(tmp_path, base, result((0.9, 1.0, 1.1), once=2.5))[0] == 1
    assert compared(tmp_path, base, result((0.9, 1.0, 1.1), once=2.3), "--margin_once", "0.1")[0] == 1


def test_results_of_other_sizes_are_not_compared(tmp_path: Path) -> None:
    old, new = (result((1.0, 2.0, 3.0), once) for once in (2.0, 4.0))
    for record, sizes in ((old, {"rows": 9, "ranks": [1, 2], "repeats": 5}), (new, {"rows": 10, "ranks": [1]})):
        record["result"]["options"] = {"repeats": 3, **sizes}
    code, said = compared(tmp_path, old, new)
    assert code == 2 and "new.json: measured with other --rows, not compared" in said
    new["result"]["options"]["rows"] = 9
    code, said = compared(tmp_path, old, new)
    assert code == 1 and "slower: cpu_s / faiss: 2000 -> 4000 ms" in said


def test_other_hardware_is_not_compared_and_bad_files_are_named(tmp_path: Path) -> None:
    code, said = compared(tmp_path, result((1, 2, 3)), result((7, 8, 9), cpu="b"))
    assert code == 2 and "other hardware" in said
    (tmp_path / "torn.json").write_text("{")
    words = [sys.executable, str(BENCH / "compare.py"), str(tmp_path / "torn.json"), str(tmp_path / "old.json")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and "torn.json: not a readable result" in done.stderr
    words[2] = str(tmp_path)
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and "name two results or two folders" in done.stderr
    assert "Errno" not in done.stderr and len(done.stderr.splitlines()) == 1


def test_results_without_a_time_in_common_are_no_all_clear(tmp_path: Path) -> None:
    old = result((1.0, 2.0, 3.0))
    renamed = {**old, "result": {"lines": old["result"]["rows"]}}
    other_bench = {**old, "command": "python bench/y.py"}
    for new in ({**old, "result": {}}, renamed, other_bench):
        code, said = compared(tmp_path, old, new)
        assert code == 2 and "new.json: nothing in common" in said and said.endswith("not compared\n")
    fewer = result((1.0, 2.0, 3.0))
    del fewer["result"]["cpu_s"]
    code, said = compared(tmp_path, old, fewer)
    assert code == 0 and "3 of 4 times compared, 0 of them changed" in said and "gone: cpu_s / faiss" in said


def test_what_is_no_result_of_a_bench_is_not_called_slower(tmp_path: Path) -> None:
    old = result((1.0, 2.0, 3.0))
    options = {**old, "result": {**old["result"], "options": None}}
    for new in ({"result": old["result"]}, {**old, "result": None}, {**old, "result": [1]}, options):
        for pair in ((old, new), (new, old)):
            code, said = compared(tmp_path, *pair)
            assert code == 2 and "json: not a result of a bench" in said and len(said.splitlines()) == 1
    code, said = compared(tmp_path, old, old, "--margin", "-1")
    assert code == 2 and "--margin -1: must be" in said
    odd = {**old, "result": {**old["result"], "cpu_s": {"faiss": {"median": 0, "low": None, "high": "x"}}}}
    assert compared(tmp_path, old, odd)[0] == 0


def test_folders_are_compared_by_name_and_recorded_hardware(tmp_path: Path) -> None:
    def folder(name: str, **results: dict[str, Any]) -> str:
        (tmp_path / name).mkdir()
        for stem, record in results.items():
            (tmp_path / name / f"{stem.replace('__', '-')}.json").write_text(json.dumps(record))
        return str(tmp_path / name)

    slow = result((3.0, 4.0, 5.0))
    old = folder("old", lars=slow, knn=slow, saves=slow)
    mine, elsewhere = result((1.0, 2.0, 2.5)), result((9.0, 9.0, 9.0), cpu="b")
    new = folder("new", lars__mine=mine, lars__b=elsewhere, lars_more__mine=elsewhere, knn=elsewhere)
    words = [sys.executable, str(BENCH / "compare.py")]
    done = subprocess.run([*words, new, old], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.startswith("lars.json since lars-mine.json: 4 of 4 times compared")
    assert done.stdout.count("compared") == 1
    for name in ("old/knn", "old/saves", "new/knn", "new/lars-b", "new/lars_more-mine"):
        assert f"{tmp_path / name}.json" in done.stderr
    done = subprocess.run([*words, folder("far", lars=elsewhere), old], capture_output=True, text=True)
    assert done.returncode == 2 and "no result of the same name and hardware" in done.stderr


def numbers_of(options: Any) -> Iterator[str]:
    """Flags of a bench that are numbers, or several."""
    for flag in cfg.flags(options):
        values = flag.default if isinstance(flag.default, tuple) else (flag.default,)
        if any(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
            yield flag.name


MEASURING = [path for path in sorted(BENCH.glob("*.py")) if "write_result(Path(" in path.read_text()]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Any]:
    """A bench as a module."""
    monkeypatch.syspath_prepend(str(BENCH))

    def load(path: Path) -> Any:
        spec = importlib.util.spec_from_file_location(f"bench_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        monkeypatch.setattr(sys, "path", [*sys.path])
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.mark.parametrize("path", MEASURING, ids=lambda path: path.stem)
def test_nonsense_sizes_are_refused_in_one_line(
    path: Path, script: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script(path)
    for name in numbers_of(module.Options()):
        for value in ("-1", *(["0"] if name in ("images", "repeats", "rows", "steps") else [])):
            monkeypatch.setattr(sys, "argv", [path.name, f"--{name}", value])
            with pytest.raises(UserError, match=f"--{name} {value}: must be above 0"):
                module.main()


@pytest.mark.parametrize("path", [path for path in MEASURING if '"cuda"]' in path.read_text()], ids=lambda p: p.stem)
def test_a_gpu_that_is_not_there_is_said_in_one_line(
    path: Path, script: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [path.name, "--device", "cuda"])
    with pytest.raises(UserError, match=r"--device cuda: no GPU is visible to this process; use --device cpu$"):
        script(path).main()


@pytest.mark.parametrize("path", MEASURING, ids=lambda path: path.stem)
def test_a_result_that_cannot_be_written_is_not_measured(
    path: Path, script: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("kept")
    for out in (tmp_path, tmp_path / "file" / "x.json"):
        monkeypatch.setattr(sys, "argv", [path.name, "--out", str(out)])
        with pytest.raises(UserError, match=f"--out {out}: cannot be written"):
            script(path).main()
    assert (tmp_path / "file").read_text() == "kept" and len(list(tmp_path.iterdir())) == 1


def test_the_suite_says_once_that_it_cannot_run(
    script: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = script(BENCH / "suite.py")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CLUSTERSSL_DATA", str(tmp_path))
    monkeypatch.setattr(suite, "run", lambda name, options: pytest.fail(f"{name} was begun"))
    with pytest.raises(UserError, match="--gpu: no GPU is visible"):
        suite.here(suite.Options(gpu=True))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--folder .*file/x/README.md: cannot be written"):
        suite.here(suite.Options(folder=str(tmp_path / "file" / "x")))
    monkeypatch.setattr(sys, "argv", ["suite.py", "--only", "lars", "data_path", "--folder", str(tmp_path)])
    with pytest.raises(UserError, match="--only data_path: no photographs"):
        suite.main()
    left = suite.here(suite.Options(folder=str(tmp_path)))
    assert left == [name for name in suite.BENCHES if name not in suite.PHOTOGRAPHS]
    assert "left out: data_path, augment, loader: no photographs" in capsys.readouterr().out
    monkeypatch.setattr(suite, "run", lambda name, options: True)
    monkeypatch.setattr(sys, "argv", ["suite.py", "--only", "lars", "--folder", str(tmp_path)])
    suite.main()
    assert "1 bench in 0 s" in capsys.readouterr().out


@pytest.mark.parametrize("gpu", [False, True])
def test_the_suite_asks_for_what_the_benches_accept(
    gpu: bool, script: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = script(BENCH / "suite.py")
    options = suite.Options(gpu=gpu, data_path="photos")
    for name in set(options.benches) - set(suite.COMMANDS):
        path, *words = suite.words_of(name, options)
        module = script(ROOT / path)
        monkeypatch.setattr(sys, "argv", [path, *words])
        asked = sys.modules["record"].flags_of(module.Options, "")
        assert asked.out == str(ROOT / "runs" / "bench" / (f"{name}-gpu.json" if gpu else f"{name}.json"))
        assert not gpu or getattr(asked, "device", "auto") != "cpu"
        assert name not in suite.PHOTOGRAPHS or asked.data_path == "photos"


def test_the_suite_runs_every_test_that_needs_a_gpu(script: Callable[[Path], Any]) -> None:
    asked = script(BENCH / "suite.py").ON_GPU
    named = {word for name in ("tests", "test_runs") for word in asked[name].split() if word.endswith(".py")}
    marked = [path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text(encoding="utf-8")]
    assert named == {str(path.relative_to(ROOT)) for path in marked} - {"tests/test_bench.py"}


def test_what_the_suite_profiles_is_a_training_as_it_runs(script: Callable[[Path], Any]) -> None:
    path, *words = script(BENCH / "suite.py").ON_GPU["profile"].split()
    asked = read_script(ROOT / path, words, 1, 1).config
    assert asked.run.profile == 10 and asked.model.compile


def tiny_images(folder: Path) -> Path:
    """Two classes that differ in colour, 32 pixels a side."""
    chance = np.random.default_rng(0)
    for split, number in (("train", 300), ("val", 20)):
        for label, low in (("dark", 0), ("light", 128)):
            (folder / split / label).mkdir(parents=True)
            for i in range(number):
                pixels = chance.integers(low, low + 128, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / label / f"{i}.png")
    return folder


@pytest.mark.slow
def test_time_to_accuracy_goes_on_piece_by_piece(tmp_path: Path) -> None:
    archive, out = tmp_path / "images.tar.gz", tmp_path / "found.json"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tiny_images(tmp_path / "images"), ".")
    words = [sys.executable, str(BENCH / "time_to_accuracy.py"), "--data_path", str(archive), "--small"]
    words += ["--folder", str(tmp_path / "run"), "--out", str(out), "--linear_epochs", "5", "--device", "cpu"]
    words += ["--epochs", "150", "--every", "60"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.run([*words, "--piece_minutes", "0.12"], capture_output=True, text=True, env=environment)
    assert first.returncode == 0 and "the same command goes on" in first.stdout, first.stdout + first.stderr
    assert not out.exists()
    last = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert last.returncode == 0 and "the schedule ended" in last.stdout, last.stdout + last.stderr
    pieces = [json.loads(line) for line in (tmp_path / "run" / "pieces.jsonl").read_text().splitlines()]
    found = json.loads(out.read_text())["result"]
    assert len(pieces) == 2 and pieces[-1]["code"] == 0
    assert [point["epoch"] for point in found["curve"]] == [1, 61, 121, 150]
    times = [point["minutes"] for point in found["curve"]]
    whole = sum(one["ended"] - one["began"] for one in pieces) / 60
    assert times == sorted(times) and times[0] > 0 and times[-1] <= whole == pytest.approx(found["minutes"])
    assert found["curve"][-1]["knn"] == 100 and found["linear"] > 90
