"""What needs no GPU, each bench with so many repeats that all of them take less than ten minutes on two cores.

    python bench/suite.py                          # writes results/NAME-here.json, then README.md
    python bench/suite.py --hardware mine --only sinkhorn kmeans

Benches of photographs are left out, with a line, where neither --data_path nor CLUSTERSSL_DATA says where some are.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from photos import folder_of_photos
from record import options_of

from clusterssl import config as cfg
from clusterssl.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
BENCHES = {
    "sinkhorn": "--ranks 1 2 --batches 256 1024 4096 --repeats 5",
    "kmeans": "--repeats 1",
    "transport": "--repeats 1",
    "lars": "--threads 1 --repeats 9",
    "train_step": "--repeats 2",
    "scale": "--repeats 1 --assume_tflops 100",
    "knn": "--repeats 2 --threads 1 --dims 128 --memory_rows 0",
    "linear": "--images 200 --threads 1 --repeats 1",
    "resident": "--batches 30 --repeats 3",
    "saves": "--repeats 2",
    "data_path": "--images 24 --repeats 5",
    "augment": "--images 12 --repeats 5",
    "loader": "--batches 10 --repeats 3",
}
PHOTOGRAPHS = ("data_path", "augment", "loader")


@dataclass(frozen=True)
class Options:
    """Suite."""

    hardware: str = "here"
    """name of this machine in the names of the results"""
    only: tuple[str, ...] = ()
    """some benches; all by default"""
    data_path: str = ""
    """folder of photographs; "": those in the folder that CLUSTERSSL_DATA names"""

    def __post_init__(self) -> None:
        unknown = set(self.only) - set(BENCHES)
        cfg.require(not unknown, f"--only {' '.join(sorted(unknown))}: unknown; there are {', '.join(BENCHES)}")


def run(name: str, options: Options) -> bool:
    """One bench; whether it ended well."""
    words = [f"bench/{name}.py", *BENCHES[name].split(), "--out", f"bench/results/{name}-{options.hardware}.json"]
    words += ["--data_path", options.data_path] if name in PHOTOGRAPHS and options.data_path else []
    print(f"\n=== python {' '.join(words)}\n", flush=True)
    began = time.monotonic()
    code = subprocess.run([sys.executable, *words], cwd=ROOT).returncode
    print(
        f"\n{name}: {f'ended with exit code {code}' if code else 'done'} in {time.monotonic() - began:.0f} s",
        flush=True,
    )
    return code == 0


def main() -> None:
    options = options_of(Options, __doc__)
    names = [name for name in BENCHES if name in options.only or not options.only]
    try:
        with folder_of_photos(options.data_path):
            pass
    except UserError as error:
        print(f"left out: {', '.join(name for name in names if name in PHOTOGRAPHS)}: {error}")
        names = [name for name in names if name not in PHOTOGRAPHS]
    began = time.monotonic()
    failed = [name for name in names if not run(name, options)]
    subprocess.run([sys.executable, "bench/readme.py"], cwd=ROOT, check=True)
    print(f"{len(names)} benches in {time.monotonic() - began:.0f} s; the page is bench/README.md")
    if failed:
        raise UserError(f"no result of {', '.join(failed)}: the reason stands above")


if __name__ == "__main__":
    cfg.entry(main)
