"""How runs stand: progress, time to go, loss, starts, from their directories alone.

    python scripts/status.py runs/mine runs/sweep

Works while they run, on any machine that sees the folders; a folder of runs stands for all runs in it.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from clusterssl.config import entry
from clusterssl.errors import UserError
from clusterssl.report.records import read_run
from clusterssl.status import find_runs, status, table


def main() -> None:
    paths = sys.argv[1:]
    if not paths or {"-h", "--help"} & set(paths):
        print(__doc__)
        return
    rows, foreign = [], []
    for path in find_runs(paths):
        try:
            rows.append(status(read_run(path), time.time()))
        except UserError as error:
            foreign.append(error)
    if rows:
        print(table(rows))
    if foreign:
        raise UserError("; ".join(map(str, foreign)))


if __name__ == "__main__":
    entry(main)
