"""What becomes of runs that are killed, cut off, filled up and confused: every fault, so many times.

    python bench/chaos.py                           # 6 minutes
    python bench/chaos.py --where slurm --times 1   # 3 minutes; needs what the tests in tests/slurm need

Two ranks train a tiny network on the built-in digits with a checkpoint after every step. After each fault the same
command is started again until it ends well, as a job script does. Then everything the run directory holds is compared
bit by bit with that of an undisturbed run: weights, optimiser, queue, kept copies, losses. Steps lost are those that
were done after the last checkpoint. Orphans are processes of a run that outlive it. On Slurm a job of 120 steps has a
checkpoint every 6.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from record import options_of, write_result
from summary import Bar, Summary, Table

from clusterssl import config as cfg
from tests.chaos import faults
from tests.chaos.harness import FLAGS, RANKS, Story, difference, whole_run
from tests.chaos.power import problems, record
from tests.launch import Launched
from tests.slurm import faults as slurm
from tests.slurm.cluster import Cluster, missing
from tests.slurm.jobs import RECIPE, TINY_JOB
from tests.test_recipes import flags_of

HEAD = ("fault", "times", "how it ended", "restarts", "steps lost at most", "all equal", "orphans")
BARS = {
    "equal": Bar("runs that differ from the undisturbed one", 0, "", most=True),
    "orphans": Bar("processes that outlive their run", 0, "", most=True),
}


@dataclass(frozen=True)
class Options:
    """Faults."""

    kills: int = 50
    """SIGKILLs, several to a run"""
    times: int = 2
    """of every other fault"""
    where: Literal["here", "slurm"] = "here"
    """on this machine, or as jobs of a Slurm cluster of two nodes that is started for it"""
    seed: int = 0
    out: str = "runs/bench/chaos.json"
    page: str = ""
    """document whose table is replaced by this one"""


def kills(whole: Path, scratch: Path, options: Options) -> Iterator[tuple[Story, str]]:
    """Runs that are killed five times each."""
    for number in range(0, options.kills, 5):
        story = faults.killed(scratch / f"kills{number}", Random(options.seed + number), min(5, options.kills - number))
        yield story, difference(story.folder, whole)


def repeated(
    fault: Callable[[Path, Random], Story], whole: Path, scratch: Path, options: Options
) -> Iterator[tuple[Story, str]]:
    """Runs that meet a fault once each."""
    for number in range(options.times):
        story = fault(scratch / f"run{number}", Random(options.seed + number))
        yield story, difference(story.folder, whole)


def on_slurm(cluster: Cluster, harm: tuple[slurm.Fault, ...], whole: Path, scratch: Path, options: Options) -> Any:
    """Jobs that meet one fault after another."""
    for number in range(options.times):
        folder = scratch / f"job{number}"
        folder.mkdir()
        yield slurm.endure_as_job(cluster, folder, *harm), difference(folder / "run", whole)
        cluster.tidy()


def row(name: str, runs: Iterator[tuple[Story, str]]) -> dict[str, Any]:
    """One line of the table."""
    began, stories = time.monotonic(), list(runs)
    all_of = [story for story, _ in stories]
    killed = sum(-9 in life for story in all_of for life in story.codes)
    found = {
        "fault": name,
        "times": killed if "SIGKILL" in name else len(all_of),
        "ended": sorted({story.ended for story in all_of}),
        "restarts": sum(story.restarts for story in all_of),
        "inside_a_save": sum(story.inside for story in all_of),
        "ended_by_force": sum(story.forced for story in all_of),
        "lost_steps": max(story.lost for story in all_of),
        "differences": [different for _, different in stories if different],
        "orphans": [orphan for story in all_of for orphan in story.orphans],
        "took_s": round(time.monotonic() - began, 1),
    }
    print(found, flush=True)
    for story in all_of:
        if story.codes[-1] != [0] * len(story.codes[-1]) or (story.forced and "SIGSTOP" not in name):
            print(*story.printed, sep="\n", flush=True)
    return found


def local_rows(scratch: Path, options: Options) -> Iterator[dict[str, Any]]:
    """Faults of one machine."""
    whole = whole_run(scratch / "whole")
    yield row("SIGKILL of a random rank at a random moment", kills(whole, scratch, options))
    once = partial(repeated, whole=whole, options=options)
    for part in ("shared", *map(str, range(RANKS))):
        name = "shared file" if part == "shared" else f"file of rank {part}"
        fault = partial(faults.flipped, part=part)
        yield row(f"flipped bit in a checkpoint, {name}", once(fault, scratch=_folder(scratch, f"flip{part}")))
    yield row("SIGSTOP of a rank", once(faults.stopped, scratch=_folder(scratch, "stop")))
    yield row("a rank stuck in Python", once(faults.stuck, scratch=_folder(scratch, "stuck")))
    if not faults.why_no_disk():
        with faults.small_disk(scratch / "disk") as disk:
            yield row("disk full", once(lambda f, c: faults.full_disk(disk / f.name, c), scratch=disk))
    images = faults.make_images(scratch / "images")
    whole = whole_run(scratch / "whole_images", "--data_path", str(images))
    for words, for_long in (("for a second", False), ("for long", True)):
        fault = partial(faults.images_gone, images=images, for_long=for_long)
        folder = _folder(scratch, f"gone{for_long}")
        yield row(f"images gone {words}", repeated(fault, whole, folder, options))


def _folder(scratch: Path, name: str) -> Path:
    (scratch / name).mkdir()
    return scratch / name


def power_row(scratch: Path) -> dict[str, Any]:
    """Power cuts, by simulation."""
    began = time.monotonic()
    logging.disable()
    found, tried = problems(record(scratch / "power"), scratch / "cut")
    logging.disable(logging.NOTSET)
    result = {"fault": "power cut between any two operations of three saves, each loss that POSIX allows (simulated)"}
    return {**result, "times": tried, "differences": found, "took_s": round(time.monotonic() - began, 1)}


def slurm_rows(scratch: Path, options: Options) -> Iterator[dict[str, Any]]:
    """Faults of a cluster."""
    flags = [*TINY_JOB, "--dump_path", str(scratch / "job")]
    codes, printed = Launched("main_swav.py", *flags_of(RECIPE)[1], *flags, ranks=2).wait()
    assert codes == [0, 0], printed
    with Cluster() as cluster:
        for name, harm in (
            (
                "an urgent job takes the nodes, later a node fails, later its link is cut",
                (slurm.urgent_job, slurm.failed_node, slurm.cut_link),
            ),
            ("SIGSTOP of a rank", (slurm.stopped_rank,)),
        ):
            folder = _folder(scratch, harm[0].__name__)
            yield row(name, on_slurm(cluster, harm, scratch / "job", folder, options))


def table(rows: list[dict[str, Any]]) -> Table:
    """The faults."""
    cells = []
    for one in rows:
        inside = f" ({one['inside_a_save']} within a save)" if "SIGKILL" in one["fault"] else ""
        equal = "yes" if not one["differences"] else f"{len(one['differences'])} not"
        cells.append((one["fault"] + inside, one["times"], "; ".join(one.get("ended", ())), one.get("restarts", ""),
                      one.get("lost_steps", 0), equal, len(one.get("orphans", ()))))  # fmt: skip
    return Table(HEAD, cells)


def summary(result: dict[str, Any]) -> Summary:
    """The result in words."""
    rows = result["rows"]
    tried = sum(one["times"] for one in rows)
    different = sum(len(one["differences"]) for one in rows)
    where = "jobs on a Slurm cluster of two nodes" if result["options"].get("where") == "slurm" else "two ranks"
    return Summary(
        "What becomes of runs that are killed, cut off, filled up and confused?",
        f"runs after a fault; an undisturbed run; {where}",
        f"{where[0].upper()}{where[1:]} train a tiny network, started again until they end well; then all that the run "
        "directory holds is compared bit by bit.",
        [table(rows)],
        [BARS["equal"].judge(different, f"{tried} faults"),
         BARS["orphans"].judge(sum(len(one.get("orphans", ())) for one in rows))],
    )  # fmt: skip


def show(rows: list[dict[str, Any]], options: Options) -> None:
    """Print and write what has been measured."""
    if options.page:
        page = Path(options.page)
        before, begin, rest = page.read_text().partition(f"<!-- {options.where} -->\n")
        page.write_text(f"{before}{begin}{table(rows)}\n\n{rest[rest.index('<!-- end -->') :]}")
    write_result(Path(options.out), {"options": cfg.plain(options), "flags": FLAGS, "rows": rows}, summary)


def main() -> None:
    options = options_of(Options, __doc__)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if options.where == "here":
            show([power_row(scratch), *local_rows(scratch, options)], options)
        else:
            cfg.require(not missing(), f"--where slurm: {missing()}")
            show(list(slurm_rows(scratch, options)), options)


if __name__ == "__main__":
    cfg.entry(main)
