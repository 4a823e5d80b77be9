"""Writes all results of a folder on one page: what was asked, what was measured, which bars are met.

    python bench/readme.py               # bench/README.md, from bench/results
    python bench/readme.py runs/bench    # runs/bench/README.md

A result NAME_MORE-HARDWARE.json is told by `summary` of bench/NAME.py, a bar without a result as not measured.
"""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from figures import read
from summary import Bar, Summary, Table

from clusterssl import config as cfg
from clusterssl.errors import UserError

HERE = Path(__file__).resolve().parent
COMMITTED = HERE / "results"
HEAD = ("bench", "what is compared", "measured", "figure", "bar", "met?")


@cache
def module_of(bench: str) -> ModuleType:
    """A bench as a module."""
    spec = importlib.util.spec_from_file_location(f"bench_{bench}", HERE / f"{bench}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def benches() -> list[str]:
    """Names of all that tell their results."""
    return sorted(path.stem for path in HERE.glob("*.py") if "\ndef summary(" in path.read_text(encoding="utf-8"))


def bench_of(stem: str) -> str:
    """Name of the bench that wrote a result: the longest that the file's name begins with.

    Raises:
        UserError: none did.
    """
    name = stem.partition("-")[0]
    found = [bench for bench in benches() if f"{name}_".startswith(f"{bench}_")]
    if not found:
        raise UserError(f"{stem}.json: no bench has this name; there are {', '.join(benches())}")
    return max(found, key=len)


def told(stem: str, record: dict[str, Any]) -> Summary:
    """A result in the words of its bench.

    Raises:
        UserError: the bench cannot read it.
    """
    try:
        return module_of(bench_of(stem)).summary(record["result"])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{stem}.json: not a result of bench/{bench_of(stem)}.py ({error!r})") from error


def overview(results: dict[str, dict[str, Any]], names: list[str], linked: bool = True) -> Table:
    """The first table: every figure that counts, and every bar that has none.

    Args:
        results: contents of the files by their stems.
        names: benches whose bars without a result are told.
        linked: whether results link to their sections.
    """
    rows: list[tuple[str, ...]] = []
    for name in sorted({*names, *map(bench_of, results)}):
        judged: list[Bar] = []
        for stem, record in results.items():
            if bench_of(stem) == name:
                summary = told(stem, record)
                judged += [line.bar for line in summary.lines if line.bar]
                rows += _rows(f"[{stem}](#{stem.lower()})" if linked else stem, summary)
        bars = getattr(module_of(name), "BARS", {}).values() if name in names else ()
        rows += [(name, "", bar.what, "", str(bar), f"not measured: {bar.needs}")
                 for bar in bars if bar not in judged]  # fmt: skip
    return Table(HEAD, rows, numbers=False)


def _rows(place: str, summary: Summary) -> list[tuple[str, ...]]:
    cells = [(line.what, line.figure, str(line.bar or "none"), line.verdict) for line in summary.lines]
    cells = cells or [("see the table", "", "none", "")]
    return [(place, "" if number else summary.compared, *row) for number, row in enumerate(cells)]


def standing(table: Table) -> str:
    """How many bars are met."""
    verdicts = [row[-1].partition(":")[0] for row in table.rows]
    counts = [f"{verdicts.count(word)} {word}" for word in ("met", "missed", "not measured")]
    return f"Bars, counted once for each result: {', '.join(counts)}."


def about(stem: str, record: dict[str, Any], link: str) -> str:
    """Where, when and how a result was measured."""
    hardware = record["hardware"]
    where = f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['gpu'] or 'no GPU'}"
    edited = " with edits that were not committed" if record.get("changed_since") else ""
    when = f"measured on {record['date']}" if "date" in record else f"commit of {record['commit_date']}"
    commit = record["commit"][:7] or "an unknown commit"
    return f"`{record['command']}`\n\n{where}; {when}, at {commit}{edited}; [JSON]({link})."


def day(record: dict[str, Any]) -> str:
    """Of the measurement, or where it was not noted of its commit."""
    return str(record.get("date") or record["commit_date"])


def page(results: dict[str, dict[str, Any]], names: list[str], folder: str = "") -> str:
    """The page, from the results by the stems of their files; `folder` leads from the page to them."""
    cfg.require(bool(results), "no results: nothing to make a page of")
    dates = sorted((day(record), stem) for stem, record in results.items())
    (first, oldest), (last, newest) = dates[0], dates[-1]
    table = overview(results, names)
    lines = [
        "# Measurements",
        "Written by `python bench/readme.py`. How each was measured, and what the others are, stands at the head of "
        "the script that its command names. Commands stand as they were run: their folders outside the repository are "
        "those of the machine.",
        f"Oldest result: `{oldest}`, {first}. Newest: `{newest}`, {last}.",
        f"{standing(table)} \"None\": no bar was set.",
        str(table),
        "\"CPU time\" is that of all threads together and depends less on what else a machine does; all other times "
        "are those of the clock.",
    ]  # fmt: skip
    for stem, record in results.items():
        lines += [f"## {stem}", str(told(stem, record)), about(stem, record, f"{folder}{stem}.json")]
    return "\n\n".join(lines) + "\n"


def all_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Results of a folder by the stems of their files."""
    return {path.stem: read(path) for path in sorted(folder.glob("*.json"))}


def write(folder: Path) -> Path:
    """Write the page of a folder and return its path: beside the results, but that of the committed ones one above."""
    committed = folder.resolve() == COMMITTED
    path = (HERE if committed else folder) / "README.md"
    path.write_text(page(all_of(folder), benches(), "results/" if committed else ""), encoding="utf-8")
    return path


def main() -> None:
    words = sys.argv[1:]
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return
    folder = Path(words[0]) if words else COMMITTED
    cfg.require(len(words) < 2 and folder.is_dir(), f"{' '.join(words)}: name one folder of results")
    print(f"the page is {write(folder)}")


if __name__ == "__main__":
    cfg.entry(main)
