"""What needs no GPU, each bench with so many repeats that all of them take less than ten minutes on two cores.

    python bench/suite.py                          # writes runs/bench/NAME.json and runs/bench/README.md
    python bench/suite.py --only sinkhorn kmeans
    python bench/suite.py --gpu --cifar10 cifar10.tar.gz           # what needs a GPU; again, to go on with training
    python bench/suite.py --folder bench/results --hardware mine    # results to be committed, with bench/README.md

At the end stand the figures with their bars, and how ours over others moved since the committed results of the same
hardware. Benches of photographs are left out, with a line, where neither --data_path nor CLUSTERSSL_DATA says where
some are; with --only they end it.
"""

from __future__ import annotations

import shutil
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
from record import check_out, options_of

from clusterssl import config as cfg
from clusterssl.errors import UserError
from clusterssl.joining import require_gpu

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
LARGE = "--device cuda --arch resnet50 --size_crops 224 96 --nmb_crops 2 6 --repeats 10"
ON_GPU = {
    "tests": "-m pytest -q -p no:cacheprovider -m gpu tests/test_kernels.py tests/data/test_devicecrops.py "
             "tests/data/test_devicedecode.py tests/data/test_fused.py tests/data/test_resident.py "
             "tests/test_auto_batch.py tests/test_snapshot.py tests/test_waits.py",
    "test_runs": "-m pytest -q -p no:cacheprovider -m gpu tests/test_gpu_runs.py",
    "train_step": "--device cuda --batch_size 512 --repeats 20",
    "train_step_compiled": "--device cuda --batch_size 512 --repeats 20 --compile true",
    "train_step_cuda_graphs": "--device cuda --batch_size 512 --repeats 20 --cuda_graphs true",
    **{f"train_step_resnet50_{n}": f"{LARGE} --batch_size {n}" for n in (64, 128, 256, 512)},
    "train_step_resnet50_compiled": f"{LARGE} --batch_size 256 --compile true",
    "train_step_resnet50w2": f"{LARGE} --arch resnet50w2 --batch_size 128",
    **{
        f"train_step_{method}": f"{LARGE} --batch_size 128 --method {method}"
        for method in ("deepclusterv2", "sela", "deepcluster", "selfclassifier")
    },
    "sinkhorn": "--device cuda --ranks 1 --repeats 50",
    "kmeans": "--device cuda --repeats 3",
    "kmeans_1m": "--device cuda --rows 1000000 --repeats 3",
    "augment": "--device cuda --images 256 --repeats 20",
    "lars": "--device cuda --repeats 50",
    "saves": "--device cuda --batch 64 --side 224 --repeats 2",
    "resident": "--device cuda --workers 1 4 8 16 --batches 200 --repeats 3",
    "loader": "--workers 1 2 4 8 16 --batches 30 --repeats 3",
    "time_to_accuracy": "--piece_minutes 5",
    "profile": "main_swav.py --data_path synthetic:4096:256x256 --arch resnet50 --batch_size 256 --epochs 2 "
               "--compile true --profile 10 --report false --dump_path runs/profile",
}  # fmt: skip
"""by how much they tell: whether it runs, what a step costs, its parts, whole runs"""
CAVEAT = """Beside the committed results of this hardware. Where a machine does other work, all times move from run to
run, others' code included; ours over theirs in the same run moves less. Details, time by time:
python bench/compare.py bench/results {folder}
"""
COMMANDS = ("tests", "test_runs", "profile")
"""that leave no result"""


@dataclass(frozen=True)
class Options:
    """Suite."""

    folder: str = "runs/bench"
    """where the results and their page go, from the root of the repository"""
    hardware: str = ""
    """name of this machine in the names of the results, NAME-HARDWARE.json; "": NAME.json, NAME-gpu.json with --gpu"""
    gpu: bool = False
    """what needs a GPU instead, in the order in which it tells most; a call without --only takes an hour or more"""
    only: tuple[str, ...] = ()
    """some of them; all by default"""
    data_path: str = ""
    """folder of photographs; "": those in the folder that CLUSTERSSL_DATA names"""

    cifar10: str = "cifar10"
    """folder or archive of CIFAR-10, for time_to_accuracy"""

    def __post_init__(self) -> None:
        unknown = set(self.only) - set(self.benches)
        cfg.require(not unknown, f"--only {' '.join(sorted(unknown))}: unknown; there are {', '.join(self.benches)}")

    @property
    def benches(self) -> dict[str, str]:
        """Names and flags."""
        return ON_GPU if self.gpu else BENCHES


def result_of(name: str, options: Options) -> Path:
    """File of a result."""
    hardware = options.hardware or ("gpu" if options.gpu else "")
    return ROOT / options.folder / (f"{name}-{hardware}.json" if hardware else f"{name}.json")


def words_of(name: str, options: Options) -> list[str]:
    """What Python is called with."""
    words = options.benches[name].split()
    if name in COMMANDS:
        return words
    words = [f"bench/{readme.bench_of(name)}.py", *words, "--out", str(result_of(name, options))]
    if name == "time_to_accuracy":
        words += ["--data_path", options.cifar10]
    return words + (["--data_path", options.data_path] if name in PHOTOGRAPHS and options.data_path else [])


def run(name: str, options: Options) -> bool:
    """One bench; whether it ended well."""
    words = words_of(name, options)
    print(f"\n=== python {' '.join(words)}\n", flush=True)
    if name == "profile":
        shutil.rmtree(ROOT / "runs" / "profile", ignore_errors=True)  # a run that has ended is not profiled again
    began = time.monotonic()
    code = subprocess.run([sys.executable, *words], cwd=ROOT).returncode
    print(
        f"\n{name}: {f'ended with exit code {code}' if code else 'done'} in {time.monotonic() - began:.0f} s",
        flush=True,
    )
    return code == 0


def report(done: list[str], options: Options, committed: dict[str, dict[str, Any]]) -> None:
    """Write the page; print the figures of the benches done, and what changed since the committed results."""
    done = [name for name in done if result_of(name, options).exists()]
    results = {path.stem: read(path) for path in (result_of(name, options) for name in done)}
    if not results:
        return
    page = readme.write(ROOT / options.folder)
    print(f"\n{readme.overview(results, sorted({*map(readme.bench_of, done)}), linked=False)}\n")
    since = [
        compare.brief(f"{name} since {stem}", old, new)
        for name, new in zip(done, results.values(), strict=True)
        for stem, old in committed.items()
        if stem.partition("-")[0] == name and old["hardware"] == new["hardware"]
    ]
    if since:
        print(CAVEAT.format(folder=options.folder), *since, sep="\n")
    print(f"\nThe page is {page}")


def here(options: Options) -> list[str]:
    """Names of the benches that can run here; prints which are left out.

    Raises:
        UserError: one was asked for by name and cannot; none can.
    """
    names = [name for name in options.benches if name in options.only or not options.only]
    if options.gpu:
        require_gpu("--gpu", "leave it out")
    check_out(ROOT / options.folder / "README.md", "--folder")
    if not (out := [name for name in names if name in PHOTOGRAPHS]):
        return names
    try:
        with folder_of_photos(options.data_path):
            return names
    except UserError as error:
        if options.only:
            raise UserError(f"--only {' '.join(out)}: {error}") from error
        print(f"left out: {', '.join(out)}: {error}")
    return [name for name in names if name not in PHOTOGRAPHS]


def main() -> None:
    options = options_of(Options, __doc__)
    names = here(options)
    began = time.monotonic()
    committed = readme.all_of(readme.COMMITTED)
    failed = [name for name in names if not run(name, options)]
    print(f"\n{len(names)} {'bench' if len(names) == 1 else 'benches'} in {time.monotonic() - began:.0f} s")
    if done := [name for name in names if name not in failed]:
        report(done, options, committed)
    if failed:
        raise UserError(f"no result of {', '.join(failed)}: the reason stands above")


if __name__ == "__main__":
    cfg.entry(main)
