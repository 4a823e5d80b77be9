"""What became slower, or faster, than the spread of the measurements.

    python bench/compare.py OLD.json NEW.json
    python bench/compare.py bench/results runs/bench      # NAME.json with NAME-HARDWARE.json of the same hardware

A time counts as changed when the quartiles of both measurements do not meet and the medians differ by more than
--margin; a time that was measured once, when it differs by more than --margin_once. Ends with 1 if anything is slower,
with 2 if two results could not be compared, else with 0.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from figures import Figure, figures, ratios, read

from clusterssl import config as cfg

UNIMPORTANT = ("repeats", "out", "folder", "page", "times", "kills", "megabytes", "step_s")
"""options that do not change what a time means, and what is measured beside them"""
ROWS = ("batches", "ranks", "workers", "dims", "ks", "gpus", "w5_batches", "leave_out", "seeds")
"""options that, where they are lists, only say which rows there are"""
SHOWN = 5
"""how many times are named that the newer result lacks"""


@dataclass(frozen=True)
class Options:
    """Comparison."""

    margin: float = 0.05
    margin_once: float = 0.2

    def __post_init__(self) -> None:
        for name, share in (("margin", self.margin), ("margin_once", self.margin_once)):
            cfg.require(share >= 0, f"--{name} {share:g}: must be a share of the old time, 0 or more")


class Change(NamedTuple):
    """A figure that both results hold."""

    verdict: str
    name: str
    old: Figure
    new: Figure

    def __str__(self) -> str:
        factor = self.new.median / self.old.median
        return f"{self.verdict}: {self.name}: {self.old.median:.4g} -> {self.new.median:.4g} ms ({factor:.2f} x)"


class Comparison(NamedTuple):
    """Two results beside each other, in words."""

    lines: list[str]
    slower: int = 0
    """how many times"""
    compared: bool = True


def verdict(old: Figure, new: Figure, options: Options) -> str:
    """slower, faster, or "" when the spread explains the difference."""
    once = old.low == old.high or new.low == new.high
    margin = 1 + (options.margin_once if once else options.margin)
    if new.median > margin * old.median and (once or new.low > old.high):
        return "slower"
    if old.median > margin * new.median and (once or old.low > new.high):
        return "faster"
    return ""


def changes(
    before: Mapping[tuple[str, ...], Figure], after: Mapping[tuple[str, ...], Figure], options: Options
) -> Iterator[Change]:
    """Every figure that both hold."""
    for path, now in after.items():
        if path in before:
            yield Change(verdict(before[path], now, options), " / ".join(path), before[path], now)


def otherwise(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Why two results cannot be compared: bench, hardware, or options that say more than how often was measured."""
    if old["hardware"] != new["hardware"]:
        return "measured on other hardware"
    scripts = {Path(word).name for record in (old, new) for word in str(record.get("command", "")).split()[1:2]}
    if len(scripts) > 1:
        return f"nothing in common ({' and '.join(sorted(scripts))})"
    before, now = (record["result"].get("options", {}) for record in (old, new))
    other = [name for name in before if name in now and before[name] != now[name] and name not in UNIMPORTANT
             and not (name in ROWS and isinstance(now[name], list))]  # fmt: skip
    return f"measured with other --{' --'.join(other)}" if other else ""


def report(name: str, old: dict[str, Any], new: dict[str, Any], options: Options) -> Comparison:
    """Every time that changed from one result to another, and those that went."""
    before, after = (dict(figures(record["result"])) for record in (old, new))
    both = list(changes(before, after, options))
    if reason := otherwise(old, new) or ("" if both else "nothing in common"):
        return Comparison([f"{name}: {reason}, not compared"], compared=False)
    found = [change for change in both if change.verdict]
    lines = [f"{name}: {len(both)} of {len(before | after)} times compared, {len(found)} of them changed"]
    lines += [f"  {change}" for change in found]
    gone = [" / ".join(path) for path in before if path not in after]
    lines += [f"  gone: {path}" for path in gone[:SHOWN]]
    lines += [f"  gone: {len(gone) - SHOWN} more"] * (len(gone) > SHOWN)
    return Comparison(lines, sum(change.verdict == "slower" for change in found))


def brief(name: str, old: dict[str, Any], new: dict[str, Any]) -> str:
    """A line on how ours stands to the others in each of two results, which a busy machine changes less than times."""
    if reason := otherwise(old, new):
        return f"{name}: {reason}, not compared"
    before, after = (dict(figures(record["result"])) for record in (old, new))
    what = "ratios to others" if ratios(before) else "times (nobody to compare ours with)"
    both = list(changes(ratios(before) or before, ratios(after) if ratios(before) else after, Options()))
    if not both:
        return f"{name}: nothing in common, not compared"
    counts = [f"{sum(one.verdict == word for one in both)} {word}" for word in ("slower", "faster")]
    worst = max(both, key=lambda one: one.new.median / one.old.median)
    more = f"; most: {worst.name}, {worst.new.median / worst.old.median:.2f} x" if worst.verdict == "slower" else ""
    return f"{name}: {len(both)} {what}: {', '.join(counts)}{more}"


def counterparts(path: Path, new: dict[str, Any], others: Mapping[Path, dict[str, Any]]) -> list[Path]:
    """Results of the same NAME on the same hardware: the one whose file is called the same, or all."""
    named = [one for one in others if one.stem.partition("-")[0] == path.stem.partition("-")[0]]
    same = [one for one in named if others[one]["hardware"] == new["hardware"]]
    return [one for one in same if one.name == path.name] or same


def pairs(old: Path, new: Path) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Results to compare, each pair with a name.

    Raises:
        UserError: a file is no result; the folders have no result in common.
    """
    if not (old.is_dir() and new.is_dir()):
        cfg.require(not (old.is_dir() or new.is_dir()), f"{old} {new}: name two results or two folders of results")
        yield new.name, read(old), read(new)
        return
    before, after = ({path: read(path) for path in sorted(folder.glob("*.json"))} for folder in (old, new))
    found = [(path, other) for path in after for other in counterparts(path, after[path], before)]
    cfg.require(bool(found), f"{old} and {new} have no result of the same name and hardware in common")
    for path, other in found:
        yield path.name if path.name == other.name else f"{path.name} since {other.name}", before[other], after[path]
    if alone := {*before, *after} - {path for pair in found for path in pair}:
        print(f"only on one side: {', '.join(sorted(map(str, alone)))}", file=sys.stderr)


def main() -> None:
    words = sys.argv[1:]
    paths = words[: next((i for i, word in enumerate(words) if word.startswith("-")), len(words))]
    options = cfg.parse(Options, words[len(paths) :], description=__doc__)
    cfg.require(len(paths) == 2, "name two results: python bench/compare.py OLD NEW")
    found = [report(*pair, options) for pair in pairs(Path(paths[0]), Path(paths[1]))]
    for comparison in found:
        print(*comparison.lines, sep="\n", file=sys.stdout if comparison.compared else sys.stderr)
    sys.exit(1 if any(one.slower for one in found) else 0 if all(one.compared for one in found) else 2)


if __name__ == "__main__":
    cfg.entry(main)
