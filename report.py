"""Write one self-contained HTML page about one or more runs.

python report.py runs/swav                       # writes runs/swav/report.html
python report.py runs/a runs/b --out compare.html
python report.py runs/swav --watch               # while it trains
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from clusterssl.config import entry
from clusterssl.errors import UserError
from clusterssl.report import Gallery, read_run, write_report
from clusterssl.report.pictures import largest_cluster
from clusterssl.report.state import state
from clusterssl.report.watch import present, server


class Parser(argparse.ArgumentParser):
    """Bad flags end like all bad input."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


def port(word: str) -> int:
    """The number of a port."""
    if not word.isdecimal() or int(word) > 65535:
        raise argparse.ArgumentTypeError(f"{word!r} is no port; give a number up to 65535, or leave the flag out")
    return int(word)


def clusters_of(runs: Sequence[Path]) -> list[Gallery]:
    """What runs made of their images; a line names those whose images or checkpoint are gone."""
    galleries: list[Gallery] = []
    if any((run / "checkpoint.pth.tar").is_file() for run in runs):
        from clusterssl.labelling.sample import galleries_of  # the network takes seconds to import

        galleries = galleries_of(runs)
    for run in runs:
        if not any(gallery.run == run for gallery in galleries):
            print(f"{run}: no gallery, checkpoint or images are out of reach or the page would be too large")
    return galleries


def watch(runs: Sequence[Path], port: int, seen: Sequence[Path]) -> None:
    """Serve the page of runs that still train or will begin, with clusters of those in `seen`."""
    from clusterssl.growing import Growing  # with torch, which takes seconds to import

    with Growing(seen) as growing, server(runs, port, pictures=growing.now) as serving:
        for run in present(runs)[1]:
            print(f"{run}: no run yet, the page waits for it")
        print(f"http://127.0.0.1:{serving.server_port}/ (Ctrl-C ends it)", flush=True)
        serving.serve_forever()


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory (--dump_path of a training)")
    parser.add_argument("--out", type=Path, help="file to write (default: report.html in the first run directory)")
    parser.add_argument("--title", default="", help="heading of the page (default: the names of the runs)")
    parser.add_argument("--no-gallery", action="store_true", help="leave out what needs the checkpoint and the images")
    parser.add_argument("--watch", action="store_true", help="serve the growing page to this machine, until Ctrl-C")
    parser.add_argument(
        "--port",
        type=port,
        metavar="PORT",
        default=0,
        help="of --watch (default: any that is free)",
    )
    given = parser.parse_args()
    if given.watch:
        watch(given.runs, given.port, [] if given.no_gallery else given.runs)
        return
    runs = [read_run(path) for path in given.runs]  # before the network is imported for one that is none
    out = given.out or given.runs[0] / "report.html"
    galleries = [] if given.no_gallery else clusters_of(given.runs)
    write_report(given.runs, out, title=given.title, galleries=galleries)
    for run in runs:
        print(state(run, time.time(), largest_cluster(galleries, run.path)))
    print(out)


if __name__ == "__main__":
    entry(main)
