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
from clusterssl.report.records import read_run
from clusterssl.status import find_runs, status, table


def main() -> None:
    paths = sys.argv[1:]
    if not paths or {"-h", "--help"} & set(paths):
        print(__doc__)
        return
    print(table([status(read_run(path), time.time()) for path in find_runs(paths)]))


if __name__ == "__main__":
    entry(main)
