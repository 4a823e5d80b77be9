"""The page of all results, which each bench tells in words, and what the suite leaves behind."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from clusterssl.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "bench"


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What readme.py defines and imports."""
    monkeypatch.syspath_prepend(str(BENCH))
    return runpy.run_path(str(BENCH / "readme.py"))


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
    memory, written = (row for row in rows_of(page, "kmeans") if row[0] == "kmeans")
    assert memory[3:] == ["", "at most 1 x", "not measured: no GPU yet"]
    assert written[4:] == ["at most 0", "not measured: no GPU yet"]
    assert "2 met, 2 missed, 3 not measured" in page


def test_ours_is_compared_with_others_of_the_same_run(names: dict[str, Any]) -> None:
    brief = names["module_of"]("compare").brief
    before, busy = kmeans(10.0, 5.0), kmeans(10.0, 5.0)
    for one in busy["result"]["systems"].values():
        one["seconds"], one["cpu_seconds"] = ([3 * x for x in one[key]] for key in ("seconds", "cpu_seconds"))
    assert brief("kmeans", before, busy) == "kmeans: 4 ratios to others: 0 slower, 0 faster"
    busy["result"]["systems"]["ours"]["seconds"] = [12.0]
    told = brief("kmeans", before, busy)
    assert told.startswith("kmeans: 4 ratios to others: 2 slower, 0 faster; most: systems / ours over ")
    assert told.endswith(" / seconds, 2.00 x")
    saves = committed("saves", names)
    assert "6 times (nobody to compare ours with): 0 slower" in brief("saves", saves, saves)
    assert brief("kmeans", before, {**before, "result": {}}) == "kmeans: nothing in common, not compared"


def test_help_tells_what_the_page_is_made_of() -> None:
    done = subprocess.run([sys.executable, str(BENCH / "readme.py"), "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "python bench/readme.py runs/bench" in done.stdout


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


def test_what_was_measured_once_has_no_spread_and_large_numbers_have_separators(names: dict[str, Any]) -> None:
    summary = sys.modules["summary"]
    one = {"median": 0.0885, "low": 0.0885, "high": 0.0885}
    assert summary.spread(one) == "88.5 ms" and summary.spread({**one, "low": 0.08}) == "88.5 ms (80.0 to 88.5)"
    assert [summary.often(n) for n in (1, 3)] == ["measured once", "medians of 3 (quartiles)"]
    assert summary.often(5, "") == "medians of 5"
    assert str(summary.Bar("", 3814.7, "MiB", most=True)) == "at most 3,815 MiB"
    assert [str(summary.Bar("", limit)) for limit in (1.25, 2)] == ["at least 1.25 x", "at least 2 x"]
    lars = committed("lars", names, repeats=1)
    for update in lars["result"]["update"].values():
        update |= {"low": update["median"], "high": update["median"]}
    page = names["page"]({"lars-x": lars}, [])
    assert "PyTorch's SGD, foreach and loop" in page
    assert "; measured once." in page and not any(" to " in cell for row in rows_of(page, "ours") for cell in row)


def test_the_two_bars_of_the_assignment_say_which_sizes_they_are_of(names: dict[str, Any]) -> None:
    found = committed("sinkhorn", names)
    for row in found["result"]["rows"]:
        row["published_over_ours"] = row["batch"] / 256 + row["ranks"]
    every, small = (line.figure for line in names["told"]("sinkhorn", found).lines)
    assert every == "2.00 x (1 rank, B = 256; rows of B = 256 to 8192)"
    assert small == "2.00 x (1 rank, B = 256; rows of B = 256 to 2048)"


def test_all_memory_of_the_page_has_one_unit(names: dict[str, Any]) -> None:
    page = names["page"](names["all_of"](BENCH / "results"), names["benches"]())
    assert " MiB" in page and not [unit for unit in (" MB", " GB", " GiB", " KiB") if unit in page]
    saves, search = committed("saves", names, megabytes=1.048576), committed("knn", names)
    assert "images: 1.00 MiB;" in str(names["told"]("saves", saves))
    for formula, met in ((3814.6, "met"), (3814.7, "missed")):
        search["result"]["memory"]["imagenet_formula_mib"] = formula
        assert verdicts(names, "knn", search)[1] == ("3,815 MiB", met)


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


def test_accuracies_are_means_over_seeds_whose_number_is_told(names: dict[str, Any]) -> None:
    record = names["read"](BENCH / "results" / "recipes_images64_cpu-epyc2.json")
    seeds = record["result"]["seeds"].values()
    page = str(names["told"]("recipes_images64_cpu-epyc2", record))
    (row,) = rows_of(page, "ours")
    single = sorted(one["ours"]["linear"] for one in seeds)
    assert row[2] == f"{sum(single) / 3:.1f} % ({single[0]:.1f} to {single[2]:.1f})" and row[-1] == "3"


def test_every_bench_that_writes_a_result_tells_it(names: dict[str, Any]) -> None:
    writing = {path.stem for path in BENCH.glob("*.py") if "write_result(Path(" in path.read_text(encoding="utf-8")}
    assert writing == set(names["benches"]())


def committed(name: str, names: dict[str, Any], **options: Any) -> dict[str, Any]:
    """A committed result as if it had been measured with other options."""
    record = names["read"](BENCH / "results" / f"{name}-epyc2.json")
    record["result"]["options"] = {**record["result"].get("options", {}), **options}
    return record


def verdicts(names: dict[str, Any], name: str, record: dict[str, Any]) -> list[tuple[str, str]]:
    """Figure, without what stands in brackets, and verdict of each line."""
    return [(line.figure.partition(" (")[0], line.verdict) for line in names["told"](name, record).lines]


def test_a_gpu_is_held_to_its_own_bars(names: dict[str, Any]) -> None:
    step = committed("train_step", names, device="cuda", nmb_crops=[2, 6], size_crops=[224, 96])
    for name, seconds in {"ours": 0.1, "bare": 0.08, "eager": 0.13, "augmentation alone": 0.005}.items():
        step["result"]["steps"][name]["median"] = seconds
    step["result"] |= {"gib": dict.fromkeys(step["result"]["steps"], 1.5), "never_waits": False}
    found = verdicts(names, "train_step", step)
    assert found == [("80.0 %", "missed"), ("1.30 x", "met"), ("1", "missed"), ("5.00 %", "met")]
    step["result"]["options"] |= {"method": "sela", "cuda_graphs": True}
    del step["result"]["steps"]["eager"]
    alone = names["told"]("train_step", step)
    assert alone.compared == "ours; bare, lightly; sela, resnet18, 2 x 224 + 6 x 96 px, 32 images, cuda_graphs"
    assert [line.verdict for line in alone.lines] == ["missed", "missed", "met"]
    scores = committed("sinkhorn", names, device="cuda", iterations=3)
    scores["result"]["rows"] = [row for row in scores["result"]["rows"] if row["batch"] == 8192][:1]
    seconds = scores["result"]["rows"][0]["seconds"]
    seconds["copying the scores"] = {**seconds["ours"], "median": seconds["ours"]["median"] / 5}
    scores["result"]["rows"][0]["launches"] = 12
    assert verdicts(names, "sinkhorn", scores) == [("1.25 x", "met"), ("1", "met")]
    scores["result"]["rows"].append({**scores["result"]["rows"][0], "launches": 14})
    assert verdicts(names, "sinkhorn", scores)[1] == ("2", "missed")
    groups = kmeans(10.0, 5.0)
    groups["result"]["options"] |= {"device": "cuda", "rows": 1000, "clusters": 10}
    groups["result"]["systems"]["ours"]["gpu_bytes"] = 50_000
    groups["result"]["written"] = 0
    assert verdicts(names, "kmeans", groups) == [("5.00 x", "met"), ("1.25 x", "missed"), ("0", "met")]
    assert verdicts(names, "augment", committed("augment", names, device="cuda"))[0][1] == ""


def test_what_was_not_measured_is_not_judged(names: dict[str, Any]) -> None:
    model = committed("scale", names)
    del model["result"]["measured"]
    for rows in model["result"]["model"].values():
        for row in rows:
            row.update(step_ms=None, own_share=None)
    assert verdicts(names, "scale", model) == []
    assert rows_of(names["page"]({"scale-x": model}, ["scale"]), "scale")[0][-1] == "not measured: no result yet"
    search = committed("knn", names)
    search["result"].pop("memory", None)
    assert len(verdicts(names, "knn", search)) == 1
    alone = names["read"](BENCH / "results" / "recipes_images64_cpu-epyc2.json")
    alone["result"]["means"] = {"ours": alone["result"]["means"]["ours"]}
    assert verdicts(names, "recipes_images64_cpu", alone) == [("53.5 %", "")]
    crowded = committed("loader", names)
    crowded["result"]["cores"] = 1
    assert verdicts(names, "loader", crowded)[0] == ("1.00 x", "met"), "more workers than cores do not count"


def test_the_time_to_an_accuracy_counts_for_the_network_that_was_demanded(names: dict[str, Any]) -> None:
    result = {"options": {"recipe": "r.sh", "small": False, "minutes": 15.0}, "flags": {"arch": "resnet18"}, "k": 20,
              "curve": [{"epoch": 10, "minutes": 1.5, "knn": 70.0}], "linear": 89.9, "minutes": 14.5,
              "images_per_s": 5000.0, "schedule_ended": True}  # fmt: skip
    assert verdicts(names, "time_to_accuracy", {"result": result}) == [("89.9 %", "missed")]
    assert "| 10    |        1.50 min | 70.00 % |" in str(names["told"]("time_to_accuracy", {"result": result}))
    result["flags"] = {"arch": "conv4"}
    assert verdicts(names, "time_to_accuracy", {"result": result}) == [("89.9 %", "")]


def test_the_suite_writes_where_git_does_not_look_and_compares(
    names: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = names["module_of"]("suite")
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
    assert [row[-1] for row in rows_of(said, "kmeans")] == ["met", "missed", *["not measured: no GPU yet"] * 2]
    since = said.partition("Beside the committed results")[2].splitlines()
    assert since[4] == "kmeans since kmeans-a: 4 ratios to others: 0 slower, 2 faster" and since[5] == ""
    assert said.count("kmeans since ") == 1 and "lars" not in said
    suite.report(["kmeans"], options, {"kmeans-a": kmeans(10.0, 8.0)})
    assert (
        "4 ratios to others: 2 slower, 0 faster; most: systems / ours over faiss.Kmeans / " in capsys.readouterr().out
    )
    assert "## kmeans-mine" in (tmp_path / "README.md").read_text()
