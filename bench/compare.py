"""What became slower, or faster, than the spread of the measurements.

    python bench/compare.py OLD.json NEW.json
    python bench/compare.py results.before bench/results      # all files that both folders hold

A time counts as changed when the quartiles of both measurements do not meet and the medians differ by more than
--margin; a time that was measured once, when it differs by more than --margin_once. Ends with 1 if anything is slower.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from figures import Figure, figures, read

from clusterssl import config as cfg

UNIMPORTANT = ("repeats", "out", "folder", "page", "times", "kills", "megabytes", "step_s")
"""options that do not change what a time means, and what is measured beside them"""
ROWS = ("batches", "ranks", "workers", "dims", "ks", "gpus", "w5_batches", "leave_out", "seeds")
"""options that, where they are lists, only say which rows there are"""


@dataclass(frozen=True)
class Options:
    """Comparison."""

    margin: float = 0.05
    margin_once: float = 0.2


def verdict(old: Figure, new: Figure, options: Options) -> str:
    """slower, faster, or "" when the spread explains the difference."""
    once = old.low == old.high or new.low == new.high
    margin = 1 + (options.margin_once if once else options.margin)
    if new.median > margin * old.median and (once or new.low > old.high):
        return "slower"
    if old.median > margin * new.median and (once or old.low > new.high):
        return "faster"
    return ""


def changes(old: dict[str, Any], new: dict[str, Any], options: Options) -> Iterator[tuple[str, str, Figure, Figure]]:
    """Every time that both results hold and that changed: verdict, name, old, new."""
    before = dict(figures(old["result"]))
    for path, now in figures(new["result"]):
        if path in before and (word := verdict(before[path], now, options)):
            yield word, " / ".join(path), before[path], now


def otherwise(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Why two results cannot be compared: their hardware, or options that say more than how often was measured."""
    if old["hardware"] != new["hardware"]:
        return "measured on other hardware"
    before, now = (record["result"].get("options", {}) for record in (old, new))
    other = [name for name in before if name in now and before[name] != now[name] and name not in UNIMPORTANT
             and not (name in ROWS and isinstance(now[name], list))]  # fmt: skip
    return f"measured with other --{' --'.join(other)}" if other else ""


def report(name: str, old: dict[str, Any], new: dict[str, Any], options: Options) -> tuple[list[str], int]:
    """What changed from one result to another, in words, and how many times became slower."""
    if reason := otherwise(old, new):
        return [f"{name}: {reason}, not compared"], 0
    found = list(changes(old, new, options))
    lines = [f"{name}: {len(found)} of {len(list(figures(new['result'])))} times changed"]
    for word, path, was, now in found:
        lines.append(f"  {word}: {path}: {was.median:.4g} -> {now.median:.4g} ms ({now.median / was.median:.2f} x)")
    return lines, sum(word == "slower" for word, *_ in found)


def pairs(old: Path, new: Path) -> list[tuple[Path, Path]]:
    """Files to compare."""
    if not (old.is_dir() and new.is_dir()):
        return [(old, new)]
    names = sorted({path.name for path in old.glob("*.json")} & {path.name for path in new.glob("*.json")})
    cfg.require(bool(names), f"{old} and {new} have no result file in common")
    return [(old / name, new / name) for name in names]


def main() -> None:
    words = sys.argv[1:]
    paths = words[: next((i for i, word in enumerate(words) if word.startswith("-")), len(words))]
    options = cfg.parse(Options, words[len(paths) :], description=__doc__)
    cfg.require(len(paths) == 2, "name two results: python bench/compare.py OLD NEW")
    slower = 0
    for before, after in pairs(Path(paths[0]), Path(paths[1])):
        lines, more = report(after.name, read(before), read(after), options)
        print(*lines, sep="\n")
        slower += more
    sys.exit(1 if slower else 0)


if __name__ == "__main__":
    cfg.entry(main)
