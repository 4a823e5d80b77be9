"""The recipe scripts give the published flags, and every published command line starts."""

from __future__ import annotations

import importlib
import json
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import main_deepclusterv2
import main_swav
from clusterssl import config as cfg
from clusterssl.data import open_source
from clusterssl.errors import UserError
from clusterssl.labelling.pseudo import read_labels
from tests.golden_files import FOLDER
from tests.launch import ROOT, metrics

MAINS = {"main_swav.py": main_swav, "main_deepclusterv2.py": main_deepclusterv2}
RECIPES = [r for r in json.loads((FOLDER / "published_recipes.json").read_text()) if r["script"] in MAINS]
SBATCH = [r for r in RECIPES if (ROOT / "scripts" / f"{r['name']}.sh").exists()]


SMALL = [
    *("--data_path", "synthetic:8:40x40", "--arch", "conv4w4", "--hidden_mlp", "16", "--batch_size", "4"),
    *("--epochs", "1", "--warmup_epochs", "0", "--workers", "0", "--device", "cpu", "--dist_url", "env://"),
    *("--report", "false"),
]
SMALLER = {
    "main_swav.py": ["--queue_length", "4", "--epoch_queue_starts", "0"],
    "main_deepclusterv2.py": ["--nmb_prototypes", "5", "4", "3"],
}


def flags_of(script: Path) -> tuple[str, list[str]]:
    """The entry script that a recipe script starts and what it passes to it."""
    text = script.read_text().replace("\\\n", " ")
    main = next(name for name in MAINS if name in text)
    return main, [word for word in shlex.split(text.split(main, 2)[-1]) if word != "$@"]


def without_places(config: Any) -> Any:
    """The configuration without paths and addresses."""
    run = replace(config.run, dump_path=".", dist_url="")
    return replace(config, data=replace(config.data, data_path=""), run=run)


def test_all_published_scripts_are_here() -> None:
    assert [r["script"] for r in SBATCH].count("main_swav.py") == 9
    assert [r["script"] for r in SBATCH].count("main_deepclusterv2.py") == 3


@pytest.mark.parametrize("recipe", SBATCH, ids=lambda r: r["name"])
def test_a_recipe_script_gives_the_published_flags(recipe: dict) -> None:
    script = ROOT / "scripts" / f"{recipe['name']}.sh"
    main, flags = flags_of(script)
    assert main == recipe["script"]
    ours, published = (cfg.parse(MAINS[main].Config, words) for words in (flags, recipe["flags"]))
    assert without_places(ours) == without_places(published)
    text = script.read_text()
    assert f"--nodes={recipe['nodes']} --ntasks-per-node={recipe['tasks_per_node']}" in text
    assert str(recipe["published"]["imagenet_linear_top1"]) in text


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("swav_*.sh")), ids=lambda s: s.name)
def test_every_recipe_script_parses(script: Path) -> None:
    main, flags = flags_of(script)
    assert cfg.parse(MAINS[main].Config, flags)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r["name"])
def test_every_published_command_line_starts(
    recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The published words, then a smaller network and fewer images, on which everything else is as it was."""
    words = [word for word in recipe["flags"] if "$" not in word or word == "${DATASET_PATH}"]
    words = [word for word in words if word not in ("--dist_url", "--dump_path")]
    script = recipe["script"]
    monkeypatch.setattr(sys, "argv", [script, *words, *SMALL, *SMALLER[script], "--dump_path", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        cfg.entry(MAINS[script].main)
    assert end.value.code == 0, capsys.readouterr()
    assert max(record.get("step", 0) for record in metrics(tmp_path)) == 2


def page_commands() -> list[str]:
    """Commands of the page of recipes, one line each."""
    text = (ROOT / "docs" / "RECIPES.md").read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.S | re.M)
    return [" ".join(line.split()) for block in blocks for line in block.splitlines()]


@pytest.fixture(scope="module")
def bench() -> Iterator[dict[str, Any]]:
    """What bench/recipes.py defines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "bench"))
        yield runpy.run_path(str(ROOT / "bench" / "recipes.py"))


def test_the_page_quotes_what_the_bench_runs(bench: dict[str, Any]) -> None:
    quoted = page_commands()
    for preset in bench["PRESETS"].values():
        assert preset.ours in quoted and preset.supervised in quoted


def test_the_bench_changes_only_places_seed_and_report(bench: dict[str, Any], tmp_path: Path) -> None:
    options = bench["Options"](preset="cifar10_cpu", data_path="/there", folder=str(tmp_path))
    env, words = bench["words_of"]("ours", 5, options)
    assert env == {"DATASET_PATH": "/there/train"}
    quoted = bench["PRESETS"]["cifar10_cpu"].ours.split()[1:]
    assert words == [*quoted, "--report", "false", "--seed", "5", "--dump_path", f"{tmp_path}/cifar10_cpu-ours-5"]


def test_the_bench_trains_on_the_true_labels(bench: dict[str, Any], tmp_path: Path) -> None:
    _, words = bench["words_of"]("supervised", 5, bench["Options"](folder=str(tmp_path)))
    table = read_labels(words[words.index("--labels") + 1])
    source = open_source("digits", split="train")
    assert table.of(source).tolist() == [source.labels.tolist()] and table.sizes == [10]


def test_the_bench_refuses_what_it_cannot_do(bench: dict[str, Any]) -> None:
    for words, message in (
        ({"preset": "none"}, "--preset none: unknown"), ({"networks": ("theirs",)}, "--networks theirs"),
        ({"networks": ("untrained",)}, "needs ours"), ({"data_path": "/there"}, "digits go with digits only"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            bench["Options"](**words)


@pytest.mark.parametrize("line", page_commands())
def test_every_command_of_the_page_parses(line: str) -> None:
    words = shlex.split(line)
    script = next(word for word in words if word.endswith((".py", ".sh")))
    given = words[words.index(script) + 1 :]
    if script.endswith(".sh"):
        main, flags = flags_of(ROOT / script)
        assert cfg.parse(MAINS[main].Config, [*flags, *given])
    else:
        assert cfg.parse(importlib.import_module(script.removesuffix(".py")).Config, given)


def measured(result: dict[str, Any], network: str) -> dict[str, float]:
    """Figures of a row of the page in the result of any of the benches."""
    if "mean_knn" in result:
        ours = result["seeds"]["ours"]
        row = {"pixels": {"knn": result["pixels_knn"]}}
        row |= {
            name: {"knn": value, "linear": result["mean_linear"][name]} for name, value in result["mean_knn"].items()
        }
        row["ours"]["cpu"] = sum(one["cpu_seconds"] for one in ours) / len(ours)
        return row[{"raw pixels": "pixels", "SwAV": "ours"}.get(network, network)]
    rows = {name.lower(): found for name, found in result["means"].items()}
    found = rows.get(network.lower()) or rows["ours"]
    return {name: found[key] for name, key in (("knn", "knn"), ("linear", "linear"), ("cpu", "cpu_seconds"))
            if key in found}  # fmt: skip


def test_every_number_of_the_page_was_measured() -> None:
    page, source, rows, table = (ROOT / "docs" / "RECIPES.md").read_text(encoding="utf-8"), "", 0, ""
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        table = (table or cells[0]) if line.startswith("|") else ""
        if table != "network" or cells[0] in ("network", "---"):
            continue
        linked = re.search(r"\(\.\./(bench/results/[\w.-]+)\)", line)
        source = linked[1] if linked else source
        if cells[1] == "not measured":
            assert cells[1:] == ["not measured", "not measured", "", ""]
            continue
        assert linked or cells[4] == "the same"
        found = measured(json.loads((ROOT / source).read_text())["result"], cells[0])
        shown = [f"{found[name]:.{digits}f}" if name in found else ""
                 for name, digits in (("knn", 1), ("linear", 1), ("cpu", 0))]  # fmt: skip
        assert cells[1:4] == shown, line
        rows += 1
    assert rows >= 6


def test_results_of_the_page_are_of_its_commands() -> None:
    quoted = page_commands()
    for path in sorted((ROOT / "bench" / "results").glob("recipes_*.json")):
        record = json.loads(path.read_text())
        assert not record["changed_since"], path.name
        assert set(record["result"]["commands"].values()) <= set(quoted), path.name
