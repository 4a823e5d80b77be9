"""What needs no GPU, each bench with so many repeats that all of them take less than ten minutes on two cores.

    python bench/suite.py                          # writes runs/bench/NAME.json and runs/bench/README.md
    python bench/suite.py --only sinkhorn kmeans
    python bench/suite.py --folder bench/results --hardware mine    # results to be committed, with bench/README.md

At the end stand the figures with their bars, and what became slower than the committed results of the same hardware.
Benches of photographs are left out, with a line, where neither --data_path nor CLUSTERSSL_DATA says where some are.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import compare
import readme
from figures import read
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

    folder: str = "runs/bench"
    """where the results and their page go, from the root of the repository"""
    hardware: str = ""
    """name of this machine in the names of the results, NAME-HARDWARE.json; "": NAME.json"""
    only: tuple[str, ...] = ()
    """some benches; all by default"""
    data_path: str = ""
    """folder of photographs; "": those in the folder that CLUSTERSSL_DATA names"""

    def __post_init__(self) -> None:
        unknown = set(self.only) - set(BENCHES)
        cfg.require(not unknown, f"--only {' '.join(sorted(unknown))}: unknown; there are {', '.join(BENCHES)}")


def result_of(name: str, options: Options) -> Path:
    """File of a result."""
    return ROOT / options.folder / (f"{name}-{options.hardware}.json" if options.hardware else f"{name}.json")


def run(name: str, options: Options) -> bool:
    """One bench; whether it ended well."""
    words = [f"bench/{name}.py", *BENCHES[name].split(), "--out", str(result_of(name, options))]
    words += ["--data_path", options.data_path] if name in PHOTOGRAPHS and options.data_path else []
    print(f"\n=== python {' '.join(words)}\n", flush=True)
    began = time.monotonic()
    code = subprocess.run([sys.executable, *words], cwd=ROOT).returncode
    print(
        f"\n{name}: {f'ended with exit code {code}' if code else 'done'} in {time.monotonic() - began:.0f} s",
        flush=True,
    )
    return code == 0


def report(done: list[str], options: Options, committed: dict[str, dict[str, Any]]) -> None:
    """Write the page; print the figures of the benches done, and what changed since the committed results."""
    results = {path.stem: read(path) for path in (result_of(name, options) for name in done)}
    page = readme.write(ROOT / options.folder)
    print(f"\n{readme.overview(results, done, linked=False)}\n")
    for name, new in zip(done, results.values(), strict=True):
        for stem, old in committed.items():
            if stem.partition("-")[0] == name and old["hardware"] == new["hardware"]:
                print(*compare.report(f"{name} since {stem}.json", old, new, compare.Options())[0], sep="\n")
    print(f"\nthe page is {page}")


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
    committed = readme.all_of(readme.COMMITTED)
    failed = [name for name in names if not run(name, options)]
    print(f"\n{len(names)} benches in {time.monotonic() - began:.0f} s")
    if done := [name for name in names if name not in failed]:
        report(done, options, committed)
    if failed:
        raise UserError(f"no result of {', '.join(failed)}: the reason stands above")


if __name__ == "__main__":
    cfg.entry(main)
