"""What is made of the benches' results: comparisons and the page of all of them."""

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
from PIL import Image

from clusterssl import config as cfg
from clusterssl.errors import UserError
from clusterssl.plan.blueprint import read_script

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "bench"


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What readme.py defines and imports."""
    monkeypatch.syspath_prepend(str(BENCH))
    return runpy.run_path(str(BENCH / "readme.py"))


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


def test_times_are_found_in_milliseconds(names: dict[str, Any]) -> None:
    figures = sys.modules["figures"].figures
    found = {" / ".join(path): one for path, one in figures(result((1.0, 2.0, 3.0))["result"])}
    assert found["rows / batch 8 / seconds / ours"] == (2000, 1000, 3000)
    assert found["cpu_s / faiss"] == (2000, 2000, 2000)
    assert found["images_per_s"] == (50, 25, 100)
    assert len(found) == 4, "options are no times"


def test_only_what_exceeds_the_spread_is_slower(tmp_path: Path) -> None:
    base = result((0.9, 1.0, 1.1))
    code, said = compared(tmp_path, base, result((1.0, 1.15, 1.3)))
    assert code == 0 and "0 of 4 times changed" in said
    code, said = compared(tmp_path, base, result((1.2, 1.3, 1.4)))
    assert code == 1 and "slower: rows / batch 9 / seconds / ours: 1000 -> 1300 ms (1.30 x)" in said
    code, said = compared(tmp_path, base, result((0.5, 0.6, 0.7)))
    assert code == 0 and said.count("faster") == 2
    assert compared(tmp_path, base, result((0.9, 1.0, 1.1), once=2.3))[0] == 0
    assert compared(tmp_path, base, result((0.9, 1.0, 1.1), once=2.5))[0] == 1
    assert compared(tmp_path, base, result((0.9, 1.0, 1.1), once=2.3), "--margin_once", "0.1")[0] == 1


def test_other_hardware_is_not_compared_and_bad_files_are_named(tmp_path: Path) -> None:
    code, said = compared(tmp_path, result((1, 2, 3)), result((7, 8, 9), cpu="b"))
    assert code == 0 and "other hardware" in said
    (tmp_path / "torn.json").write_text("{")
    words = [sys.executable, str(BENCH / "compare.py"), str(tmp_path / "torn.json"), str(tmp_path / "old.json")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and "torn.json: not a readable result" in done.stderr


def kmeans(published: float, faiss: float) -> dict[str, Any]:
    """A result of bench/kmeans.py in which ours takes two seconds an iteration."""
    seconds = {"ours": 2.0, "published": published, "faiss.Kmeans": faiss}
    systems = {
        name: {"seconds": [x], "cpu_seconds": [x], "inertia": 1.0, "median_seconds": x, "median_cpu_seconds": x,
               "seconds_over_ours": x / 2, "cpu_seconds_over_ours": x / 2, "inertia_over_ours": 1.0}
        for name, x in seconds.items()
    }  # fmt: skip
    options = {"rows": 9, "dim": 3, "clusters": 2, "iterations": 1, "repeats": 1, "data": "groups", "threads": 1,
               "device": "cpu"}  # fmt: skip
    about = {
        "hardware": {"cpu": "a", "cores": 2, "gpu": None},
        "date": "2024-02-03",
        "command": "python bench/kmeans.py",
    }
    return {**about, "commit": "0123456789", "changed_since": True, "result": {"options": options, "systems": systems}}


def rows_of(page: str, start: str) -> list[list[str]]:
    """Cells of the table rows that begin with a word."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    return [row for row in rows if row[0].startswith(start)]


def test_times_have_their_units_and_stand_beside_ours(names: dict[str, Any]) -> None:
    page = names["page"]({"kmeans-x": kmeans(10.0, 5.0)}, [])
    assert rows_of(page, "ours") == [["ours", "2,000 ms", "1.00 x", "2,000 ms", "1.00 x", "1.0000"]]
    assert rows_of(page, "published")[0][1:3] == ["10,000 ms", "5.00 x"]
    assert "a, 2 cores, no GPU; measured on 2024-02-03, at 0123456 with edits that were not committed" in page


def test_a_bar_is_met_missed_or_not_measured(names: dict[str, Any]) -> None:
    page = names["page"]({"kmeans-x": kmeans(10.0, 5.0), "kmeans_more-x": kmeans(3.0, 7.0)}, ["kmeans", "lars"])
    told = {(row[0].split("]")[0].strip("["), row[2]): row[3:] for row in rows_of(page.split("##")[0], "")}
    published, faiss = (f"{name} time of an iteration over ours" for name in ("published algorithm's", "faiss's"))
    assert told["kmeans-x", published] == ["5.00 x (CPU time 5.00 x)", "at least 1.8 x", "met"]
    assert told["kmeans-x", faiss][1:] == ["at least 3 x", "missed"] and told["kmeans_more-x", faiss][2] == "met"
    assert told["kmeans_more-x", published] == ["1.50 x (CPU time 1.50 x)", "at least 1.8 x", "missed"]
    assert "time of an iteration over ours: 2.50 x (CPU time 2.50 x); demanded at least 3 x: **missed**" in page
    (lars,) = (row for row in rows_of(page, "lars"))
    assert lars[3:] == ["", "at most 1.3 x", "not measured: no result yet"]
    (gpu,) = (row for row in rows_of(page, "kmeans ") + rows_of(page, "kmeans") if row[0] == "kmeans")
    assert gpu[3:] == ["", "at most 0", "not measured: no GPU yet"]
    assert "2 met, 2 missed, 2 not measured" in page


@pytest.mark.parametrize(("value", "most", "met"), [(2.0, True, True), (2.01, True, False), (2.0, False, True),
                                                    (1.99, False, False)])  # fmt: skip
def test_a_bar_includes_its_limit(names: dict[str, Any], value: float, most: bool, met: bool) -> None:
    line = names["Bar"]("what", 2, most=most).judge(value)
    assert line.met is met and line.verdict == ("met" if met else "missed")


def test_numbers_keep_three_digits(names: dict[str, Any]) -> None:
    number, duration = (getattr(sys.modules["summary"], name) for name in ("number", "duration"))
    assert [number(x) for x in (0, 3, 0.00435, 2.0, 99.97, 123.4, 51234.5)] == [
        "0", "3", "0.00435", "2.00", "100", "123", "51,234"]  # fmt: skip
    assert [duration(2.0, unit) for unit in ("s", "ms", "us")] == ["2.00 s", "2,000 ms", "2,000,000 us"]
    assert duration(150.0, "min") == "2.50 min"


def test_the_page_names_the_oldest_and_newest_result(names: dict[str, Any]) -> None:
    undated = {key: value for key, value in kmeans(3.0, 3.0).items() if key != "date"}
    older = {**undated, "commit_date": "2023-01-01"}
    page = names["page"]({"kmeans_a-x": older, "kmeans_b-x": kmeans(3.0, 3.0)}, [])
    assert "Oldest result: `kmeans_a-x`, 2023-01-01. Newest: `kmeans_b-x`, 2024-02-03." in page
    assert "commit of 2023-01-01" in page


def test_results_are_told_by_the_bench_whose_name_they_bear(names: dict[str, Any]) -> None:
    wanted = {"kmeans": "kmeans", "kmeans_1m-here": "kmeans", "recipes_cifar10_cpu-a": "recipes",
              "cifar10_cpu-a": "cifar10_cpu", "chaos_slurm-a-b": "chaos"}  # fmt: skip
    assert {stem: names["bench_of"](stem) for stem in wanted} == wanted
    with pytest.raises(UserError, match=r"nothing-x\.json: no bench has this name"):
        names["bench_of"]("nothing-x")
    with pytest.raises(UserError, match=r"lars-x\.json: not a result of bench/lars\.py"):
        names["told"]("lars-x", kmeans(3.0, 3.0))


def test_the_page_in_the_repository_is_that_of_its_results(names: dict[str, Any]) -> None:
    results = names["all_of"](BENCH / "results")
    page = names["page"](results, names["benches"](), "results/")
    assert (BENCH / "README.md").read_text(encoding="utf-8") == page, "run python bench/readme.py"
    assert results and all(f"## {stem}\n" in page and f"(results/{stem}.json)" in page for stem in results)


def test_every_bench_that_writes_a_result_tells_it(names: dict[str, Any]) -> None:
    assert {path.stem for path in MEASURING} == set(names["benches"]())


def test_accuracies_are_means_over_seeds_whose_number_is_told(names: dict[str, Any]) -> None:
    record = names["read"](BENCH / "results" / "recipes_images64_cpu-epyc2.json")
    seeds = record["result"]["seeds"].values()
    page = str(names["told"]("recipes_images64_cpu-epyc2", record))
    (row,) = rows_of(page, "ours")
    single = sorted(one["ours"]["linear"] for one in seeds)
    assert row[2] == f"{sum(single) / 3:.1f} % ({single[0]:.1f} to {single[2]:.1f})" and row[-1] == "3"


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


def test_the_suite_writes_where_git_does_not_look_and_compares(
    script: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = script(BENCH / "suite.py")
    assert suite.result_of("lars", suite.Options()) == ROOT / "runs" / "bench" / "lars.json"
    assert subprocess.run(["git", "check-ignore", "-q", "runs/bench/lars.json"], cwd=ROOT).returncode in (0, 128)
    options = suite.Options(folder=str(tmp_path), hardware="mine")

    def measured(words: list[str], **_: Any) -> Any:
        assert words[1] == "bench/kmeans.py"
        Path(words[words.index("--out") + 1]).write_text(json.dumps(kmeans(10.0, 5.0)))
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(suite.subprocess, "run", measured)
    assert suite.run("kmeans", options)
    before = kmeans(10.0, 4.0)
    larger = {**before, "result": {**before["result"], "options": {**before["result"]["options"], "rows": 10}}}
    other = {**before, "hardware": {"cpu": "b"}}
    suite.report(["kmeans"], options, {"kmeans-a": before, "kmeans_b-a": larger, "kmeans-c": other, "lars-a": before})
    said = capsys.readouterr().out
    assert [row[-1] for row in rows_of(said, "kmeans")] == ["met", "missed", "not measured: no GPU yet"]
    assert "slower: systems / faiss.Kmeans / seconds: 4000 -> 5000 ms (1.25 x)" in said
    assert said.count(" since ") == 1 and "lars" not in said
    assert "## kmeans-mine" in (tmp_path / "README.md").read_text()


def test_results_of_other_sizes_are_not_compared(tmp_path: Path) -> None:
    old, new = kmeans(10.0, 5.0), kmeans(20.0, 5.0)
    new["result"]["options"] |= {"rows": 10, "repeats": 7}
    code, said = compared(tmp_path, old, new)
    assert code == 0 and "new.json: measured with other --rows, not compared" in said
    new["result"]["options"]["rows"] = 9
    assert compared(tmp_path, old, new)[0] == 1


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
        asked = sys.modules["record"].options_of(module.Options, "")
        assert asked.out == str(ROOT / "runs" / "bench" / f"{name}.json")
        assert not gpu or getattr(asked, "device", "auto") != "cpu"
        assert name not in suite.PHOTOGRAPHS or asked.data_path == "photos"


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
