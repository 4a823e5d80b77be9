"""Writes bench/README.md: all results of bench/results on one page.

python bench/readme.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from figures import date, figures, read

FOLDER = Path(__file__).resolve().parent
MOST_ROWS = 24


def page(results: dict[str, dict[str, Any]]) -> str:
    """The page, from the results by file name."""
    dates = sorted((date(record), name) for name, record in results.items())
    known = [entry for entry in dates if entry[0]]
    lines = [
        "# Measurements", "",
        "Written by `python bench/readme.py` from the files in `results/`. Times are medians in milliseconds and their",
        "quartiles; where a file counts images or crops a second, those of one.", "",
    ]  # fmt: skip
    if known:
        (first, oldest), (last, newest) = known[0], known[-1]
        lines += [f"Oldest result: `{oldest}`, {first}. Newest: `{newest}`, {last}.", ""]
    for name, record in sorted(results.items()):
        lines += section(name, record)
    return "\n".join(lines).rstrip() + "\n"


def section(name: str, record: dict[str, Any]) -> list[str]:
    """One result."""
    hardware = record.get("hardware", {})
    where = hardware.get("gpu") or f"{hardware.get('cpu', '?')}, {hardware.get('cores', '?')} cores"
    state = " with changes" if record.get("changed_since") else ""
    about = f"{where}; {date(record) or 'no date'}, commit {record.get('commit', '')[:7]}{state}"
    lines = [f"## [{name}](results/{name})", "", f"`{record.get('command', '')}`", "", about + ".", ""]
    table: dict[str, dict[str, str]] = {}
    for path, one in figures(record["result"]):
        spread = f" ({_shown(one.low)}-{_shown(one.high)})" if one.low < one.high else ""
        table.setdefault(" / ".join(path[:-1]), {})[path[-1]] = _shown(one.median) + spread
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    if not columns:
        return lines
    if len(table) > MOST_ROWS:
        lines += [f"The first {MOST_ROWS} of {len(table)} rows:", ""]
    lines += ["| |" + "".join(f" {column} |" for column in columns), "|---|" + "---|" * len(columns)]
    for label, row in list(table.items())[:MOST_ROWS]:
        lines.append(f"| {label} |" + "".join(f" {row.get(column, '')} |" for column in columns))
    return [*lines, ""]


def _shown(milliseconds: float) -> str:
    return f"{milliseconds:,.0f}" if milliseconds >= 1000 else f"{milliseconds:.3g}"


def main() -> None:
    results = {path.name: read(path) for path in sorted((FOLDER / "results").glob("*.json"))}
    (FOLDER / "README.md").write_text(page(results), encoding="utf-8")
    print(f"{len(results)} results on {FOLDER / 'README.md'}")


if __name__ == "__main__":
    main()
