"""From run records to the page: which charts and tables there are, and the template that holds them."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import IO, Any, NamedTuple

import jinja2
from markupsafe import Markup

from clusterssl.errors import UserError
from clusterssl.files import atomic_write
from clusterssl.report.figures import SERIES, Series, line_chart, use_chart
from clusterssl.report.pictures import Gallery, Strip, largest_cluster
from clusterssl.report.records import RunRecord, read_run
from clusterssl.report.tables import Table, shown, table_of
from clusterssl.report.verdict import verdict

SAMPLED_ROWS = 12


class Quantity(NamedTuple):
    """What a chart shows of the training records."""

    key: str
    title: str
    caption: str
    percent: bool = False


QUANTITIES = (
    Quantity("loss", "Loss", "ln K is what a network scores that cannot tell images apart."),
    Quantity("lr", "Learning rate", "Of the first parameter group."),
    Quantity("perplexity", "Prototypes in effective use", "Perplexity of the assignments; K when all are used alike."),
    Quantity("dead_share", "Unused prototypes", "Nearest to no image since the record before.", True),
    Quantity("entropy", "Entropy of an assignment", "Nats; 0 when an image has one prototype, ln K when undecided."),
    Quantity("feature_std", "Spread of the embeddings", "1 when spread evenly, 0 when all images look alike."),
    Quantity("rankme", "Effective rank of the embeddings", "RankMe; 1 when they have collapsed to a line."),
    Quantity("images_per_s", "Throughput", "Images per second, all processes together."),
    Quantity("data_wait", "Waiting for data", "Share of the time in which the device had nothing to do.", True),
)


class Chart(NamedTuple):
    """One figure of the page; `key` is the name of its curves."""

    key: str
    title: str
    caption: str
    svg: Markup


def write_report(
    runs: Sequence[Path],
    out: Path,
    *,
    title: str = "",
    lead: str = "",
    tables: Sequence[Table] = (),
    galleries: Sequence[Gallery] = (),
) -> None:
    """Write one HTML page about one or more runs that needs nothing but itself.

    Args:
        runs: run directories, shown in this order.
        out: file of the page.
        title: heading; made from the runs' names when empty.
        lead: a paragraph under the heading.
        tables: results to show before everything else.
        galleries: strips of thumbnails.

    Raises:
        UserError: a run directory is missing or empty, or the page cannot be written.
    """
    if not runs:
        raise UserError("no run directory given; name at least one")
    records = [read_run(path) for path in runs]
    _write(render(records, title=title, lead=lead, tables=tables, galleries=galleries), out)


def write_page(
    out: Path, *, title: str, lead: str = "", tables: Sequence[Table] = (), galleries: Sequence[Gallery] = ()
) -> None:
    """Write one such page about no run: tables and thumbnails only.

    Raises:
        UserError: the page cannot be written.
    """
    _write(render([], title=title, lead=lead, tables=tables, galleries=galleries), out)


def _write(page: str, out: Path) -> None:
    if not out.parent.is_dir():
        raise UserError(f"{out.parent}: no such folder, so the page cannot be written there; make it first")

    def write(file: IO[bytes]) -> None:
        file.write(page.encode("utf-8"))

    atomic_write(out, write)


def render(
    runs: Sequence[RunRecord],
    *,
    title: str = "",
    lead: str = "",
    tables: Sequence[Table] = (),
    galleries: Sequence[Gallery] = (),
    seconds: int = 0,
) -> str:
    """The page as text; a browser asks for it again after so many seconds, unless they are 0."""
    folder = resources.files("clusterssl.report")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["shown"] = shown
    template = environment.from_string(folder.joinpath("page.html").read_text(encoding="utf-8"))
    return template.render(
        title=title or "Run " + ", ".join(run.name for run in runs),
        lead=lead,
        seconds=seconds,
        js=Markup(folder.joinpath("page.js").read_text(encoding="utf-8")),
        css=Markup(folder.joinpath("page.css").read_text(encoding="utf-8")),
        made=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        runs=[_described(run, largest_cluster(galleries, run.path)) for run in runs],
        lines=SERIES,
        tables=[*tables, *_evaluations(runs)],
        galleries=_shown_galleries(runs, galleries),
        charts=_charts(runs),
        use=_use(runs),
    )


def _shown_galleries(runs: Sequence[RunRecord], galleries: Sequence[Gallery]) -> list[dict[str, Any]]:
    """What the template shows of galleries: each with its run, strips, and whether readers choose among them."""
    places = {run.path: at for at, run in enumerate(runs)}
    shown = []
    for gallery in galleries:
        at = places.get(gallery.run) if gallery.run is not None else None
        name = f"{runs[at].name}: " if at is not None and len(runs) > 1 else ""
        strips = [Strip(*strip) for strip in gallery.strips]
        shown.append(
            {"title": name + gallery.title, "note": gallery.note, "wide": gallery.wide, "run": at, "strips": strips,
             "choice": gallery.choice and len(strips) > 1, "sizes": any(strip.images is not None for strip in strips),
             "purities": any(strip.purity is not None for strip in strips)}
        )  # fmt: skip
    return shown


def _charts(runs: Sequence[RunRecord]) -> list[Chart]:
    charts = []
    for key, title, caption, percent in QUANTITIES:
        series = [Series(run.name, *run.curve(key)) for run in runs]
        if not any(line.x for line in series):
            continue
        first = key == "loss"
        levels = sorted({round(run.last("ln_k") or 0.0, 6) for run in runs} - {0.0}) if first else []
        svg = line_chart(
            key, f"{title} over training steps", series, levels=[(level, f"ln K = {level:.2f}") for level in levels],
            floor=not first, percent=percent, large=first,
        )  # fmt: skip
        charts.append(Chart(key, title, caption, Markup(svg)))
    return charts


def _use(runs: Sequence[RunRecord]) -> Chart | None:
    counts = [(run.name, run.occupancy()) for run in runs]
    if not any(count for _, count in counts):
        return None
    title = "Use of the prototypes in the last epoch"
    svg = use_chart("use", title, [(name, count or [0]) for name, count in counts])
    return Chart("use", title, "Share of all assignments each prototype received.", Markup(svg))


def _evaluations(runs: Sequence[RunRecord]) -> list[Table]:
    """One table per kind of evaluation, one row per record."""
    found: dict[str, list[dict[str, Any]]] = {}
    places: dict[str, list[int]] = {}
    for at, run in enumerate(runs):
        for record in run.evaluations:
            flat = {key: value for key, value in record.items() if not isinstance(value, (dict, list))}
            found.setdefault(str(record["eval"]), []).append({"run": run.name, **flat})
            places.setdefault(str(record["eval"]), []).append(at)
    tables = []
    for kind, rows in found.items():
        equal = {
            key: rows[0][key] for key in rows[0] if len(rows) > 1 and all(row.get(key) == rows[0][key] for row in rows)
        }
        equal = {key: value for key, value in equal.items() if key not in ("eval", "time", "run")}
        note = f"In all rows: {shown(equal)}." if equal else ""
        table = table_of(f"Evaluation: {kind}", rows, leave_out=("eval", "time", *equal))
        tables.append(replace(table, runs=tuple(places[kind]), note=note))
    return tables


def _start(launch: dict[str, Any]) -> dict[str, Any]:
    """A start of a run as one reads it: the beginning of its id, its time as a date."""
    began = datetime.datetime.fromtimestamp(launch.get("time", 0), datetime.timezone.utc)
    return {**launch, "id": str(launch.get("id", ""))[:8], "time": f"{began:%Y-%m-%d %H:%M:%S} UTC"}


def _described(run: RunRecord, largest: float | None) -> dict[str, Any]:
    """What the template shows of one run besides charts."""
    about = run.about
    argv = about.get("argv")
    command = about.get("command") or (" ".join(map(str, argv)) if isinstance(argv, list) else "")
    config = about.get("config")
    environment: dict[str, Any] = {}
    for group, value in about.items():
        if group in ("argv", "command", "config", "time") or value in (None, "", [], {}):
            continue
        environment |= (
            {f"{group} {key}": part for key, part in value.items()} if isinstance(value, dict) else {group: value}
        )
    every = max(1, -(-len(run.steps) // SAMPLED_ROWS))
    sampled = run.steps[::every]
    if run.steps and sampled[-1] is not run.steps[-1]:
        sampled = [*sampled, run.steps[-1]]
    return {
        "name": run.name,
        "path": str(run.path),
        "remarks": verdict(run, largest),
        "command": command,
        "config": config if isinstance(config, dict) else {},
        "environment": environment,
        "launches": table_of("Starts", [_start(launch) for launch in run.launches]) if run.launches else None,
        "numbers": table_of("Some of the logged steps", sampled, leave_out=("time",)) if sampled else None,
    }
