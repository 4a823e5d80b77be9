"""k-NN search: ours beside faiss's exact search on the same machine, and the memory that it takes beside the features.

    python bench/knn.py                              # all cores
    python bench/knn.py --threads 1
    python bench/knn.py --memory_rows 0             # speed alone

Both search the same unit features in turns; building faiss's index is left out of its time. CPU time, that of all
threads together, depends less on what else the machine does. The memory run reads 100,000 features memory-mapped,
watches the anonymous memory of the process (its own, not the pages of the files) and compares the peak with the
formula that eval_knn.py shows; then the formula is told for ImageNet.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import numpy as np
import torch
import torch.nn.functional as F
from record import write_result
from torch import Tensor

from clusterssl import config as cfg
from clusterssl.evals.knn import CHUNK, knn_accuracy, memory_mib, nearest

IMAGENET = {"num_train": 1_281_167, "num_queries": 50_000, "feature_dim": 2048, "largest_k": 200}


@dataclass(frozen=True)
class Options:
    """Comparison."""

    rows: int = 50_000
    """training images"""
    queries: int = 2048
    dims: tuple[int, ...] = (128, 2048)
    """feature sizes"""
    ks: tuple[int, ...] = (20, 200)
    """numbers of neighbours"""
    repeats: int = 3
    memory_rows: int = 100_000
    """training images of the memory run; 0: none"""
    memory_queries: int = 10_000
    threads: int = 0
    """0: all cores"""
    seed: int = 0
    out: str = "bench/results/knn.json"


def features(rows: int, dim: int, seed: int) -> Tensor:
    """Unit rows around 1000 random centres [N, F]."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(1000, dim, generator=torch.Generator().manual_seed(99))
    members = torch.randint(1000, (rows,), generator=generator)
    return F.normalize(centres[members] + 2 * torch.randn(rows, dim, generator=generator), dim=1)


def timed(call: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds by the clock and of all threads, and the result."""
    clock, cpu = time.perf_counter(), time.process_time()
    found = call()
    return time.perf_counter() - clock, time.process_time() - cpu, found


def search(options: Options, dim: int, k: int) -> dict[str, Any]:
    """Medians of both systems, and the share of neighbours that they agree on."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    bank, queries = features(options.rows, dim, 1), features(options.queries, dim, 2)
    index = faiss.IndexFlatIP(dim)
    index.add(bank.numpy())
    systems = {
        "ours": lambda: torch.cat([row for _, row in nearest(bank, queries.split(CHUNK), k)]).numpy(),
        "faiss": lambda: index.search(queries.numpy(), k)[1],
    }
    clock: dict[str, list[float]] = {name: [] for name in systems}
    cpu: dict[str, list[float]] = {name: [] for name in systems}
    rows = {}
    for repeat in range(options.repeats + 1):
        for name, call in systems.items():
            seconds, busy, rows[name] = timed(call)
            if repeat:  # the first round warms up
                clock[name].append(seconds)
                cpu[name].append(busy)
    same = np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(rows["ours"], rows["faiss"], strict=True)])
    found = {
        "dim": dim, "k": k, "clock_s": {name: median(values) for name, values in clock.items()},
        "cpu_s": {name: median(values) for name, values in cpu.items()}, "same_neighbours": float(same),
    }  # fmt: skip
    found["times_faiss_cpu"] = found["cpu_s"]["ours"] / found["cpu_s"]["faiss"]
    return found


def anonymous_mib() -> float:
    """Memory of this process that belongs to no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


class Peak(threading.Thread):
    """Watches the anonymous memory while a block runs."""

    def __enter__(self) -> Peak:
        self.before, self.highest, self.done = anonymous_mib(), 0.0, threading.Event()
        self.start()
        return self

    def run(self) -> None:
        while not self.done.wait(0.002):
            self.highest = max(self.highest, anonymous_mib())

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.join()

    @property
    def mib(self) -> float:
        return self.highest - self.before


def memory(options: Options, folder: Path) -> dict[str, Any]:
    """Measured and computed peak for memory-mapped features of 2048 numbers."""
    rows, queries, dim, k = options.memory_rows, options.memory_queries, 2048, 200
    mapped = []
    for name, number in (("train", rows), ("val", queries)):
        file = np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=np.float32, shape=(number, dim))
        for start in range(0, number, 10_000):
            file[start : start + 10_000] = features(min(10_000, number - start), dim, start)
        file.flush()
        del file
        mapped.append(torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="c")))
    labels = [torch.arange(len(x)) % 1000 for x in mapped]
    with Peak() as peak:
        knn_accuracy(mapped[0], labels[0], mapped[1], labels[1], ks=(k,))
    formula = memory_mib(rows, queries, k, feature_dim=dim)
    return {
        "rows": rows, "queries": queries, "dim": dim, "k": k, "peak_mib": peak.mib, "formula_mib": formula,
        "imagenet_formula_mib": memory_mib(**IMAGENET), "imagenet": IMAGENET,
    }  # fmt: skip


def main() -> None:
    options = cfg.parse(Options, description=__doc__)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    result: dict[str, Any] = {"threads": torch.get_num_threads(), "rows": options.rows, "queries": options.queries}
    if options.memory_rows:
        with tempfile.TemporaryDirectory() as folder:
            result["memory"] = memory(options, Path(folder))
        print("memory: peak {peak_mib:.0f} MiB, formula {formula_mib:.0f}; ImageNet {imagenet_formula_mib:.0f}".format(
            **result["memory"]
        ))  # fmt: skip
    result["search"] = []
    print(f"{'dim':>6}{'k':>6}{'ours, CPU s':>14}{'faiss, CPU s':>14}{'ours/faiss':>12}{'same':>9}")
    for dim in options.dims:
        for k in options.ks:
            found = search(options, dim, k)
            result["search"].append(found)
            times = found["cpu_s"]
            print(f"{dim:6}{k:6}{times['ours']:14.2f}{times['faiss']:14.2f}{found['times_faiss_cpu']:12.2f}"
                  f"{found['same_neighbours']:9.4f}", flush=True)  # fmt: skip
    write_result(Path(options.out), result)


if __name__ == "__main__":
    cfg.entry(main)
