"""k-NN search: ours beside faiss's exact search on the same machine, and the memory that it takes beside the features.

    python bench/knn.py                              # all cores
    python bench/knn.py --threads 1
    python bench/knn.py --memory_rows 0             # speed alone

All search the same features in turns: ours, which lets faiss compare where it is installed; ours without faiss; faiss
from the features, which it must bring to unit length and put into its index, too; and faiss with its index ready. CPU
time, that of all threads together, depends less on what else the machine does. The memory run reads 100,000 features
memory-mapped, watches the anonymous memory of the process (its own, not the pages of the files) and compares the peak
with the formula that eval_knn.py shows; then the formula is told for ImageNet.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import numpy as np
import torch
from record import options_of, write_result
from summary import MEGABYTES, Bar, Line, Summary, Table, count, duration, quantity, times
from torch import Tensor

from clusterssl import config as cfg
from clusterssl.evals import search
from clusterssl.evals.knn import knn_accuracy
from clusterssl.evals.search import CHUNK, memory_mib, nearest

IMAGENET = {"num_train": 1_281_167, "num_queries": 50_000, "feature_dim": 2048, "largest_k": 200}
BARS = {
    "faiss": Bar("faiss's CPU time from features over ours, the smallest ratio over all features and k", 1),
    "memory": Bar(
        "memory beside the features, 1.28 M x 2048 against 50,000 queries", 4000 * MEGABYTES, "MiB", most=True
    ),
}
"""the memory by the formula that the measured peak must not exceed"""


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
    out: str = "runs/bench/knn.json"


def features(rows: int, dim: int, seed: int) -> Tensor:
    """Rows around 1000 random centres [N, F]."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(1000, dim, generator=torch.Generator().manual_seed(99))
    members = torch.randint(1000, (rows,), generator=generator)
    return centres[members] + 2 * torch.randn(rows, dim, generator=generator)


def timed(call: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds by the clock and of all threads, and the result."""
    clock, cpu = time.perf_counter(), time.process_time()
    found = call()
    return time.perf_counter() - clock, time.process_time() - cpu, found


def compared(options: Options, dim: int, k: int) -> dict[str, Any]:
    """Medians of both systems, and the share of neighbours that they agree on."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    bank, queries = features(options.rows, dim, 1), features(options.queries, dim, 2)
    unit = [x.numpy().copy() for x in (bank, queries)]
    for rows_NF in unit:
        faiss.normalize_L2(rows_NF)
    index = faiss.IndexFlatIP(dim)
    index.add(unit[0])

    def ours() -> np.ndarray:
        return torch.cat([row for _, row in nearest(bank, queries.split(CHUNK), k)]).numpy()

    def without_faiss() -> np.ndarray:
        with patch.object(search, "searched_by_faiss", lambda *_: False):
            return ours()

    def from_features() -> np.ndarray:
        own, copies = faiss.IndexFlatIP(dim), [x.numpy().copy() for x in (bank, queries)]
        for rows_NF in copies:
            faiss.normalize_L2(rows_NF)
        own.add(copies[0])
        return own.search(copies[1], k)[1]

    systems = {
        "ours": ours, "without_faiss": without_faiss, "faiss": from_features,
        "index_ready": lambda: index.search(unit[1], k)[1],
    }  # fmt: skip
    clock: dict[str, list[float]] = {name: [] for name in systems}
    cpu: dict[str, list[float]] = {name: [] for name in systems}
    found_rows = {}
    for repeat in range(options.repeats + 1):
        for name, call in systems.items():
            seconds, busy, found_rows[name] = timed(call)
            if repeat:  # the first round warms up
                clock[name].append(seconds)
                cpu[name].append(busy)
    pair = found_rows["ours"], found_rows["faiss"]
    same = np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(*pair, strict=True)])
    found = {
        "dim": dim, "k": k, "clock_s": {name: median(values) for name, values in clock.items()},
        "cpu_s": {name: median(values) for name, values in cpu.items()}, "same_neighbours": float(same),
    }  # fmt: skip
    found["ours_times"] = {name: found["cpu_s"]["ours"] / found["cpu_s"][name] for name in systems if name != "ours"}
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


def summary(result: dict[str, Any]) -> Summary:
    """The result in words."""
    names = {"without_faiss": "ours without faiss", "faiss": "faiss from features", "index_ready": "faiss, index ready"}
    rows = [
        (one["dim"], one["k"], duration(one["cpu_s"]["ours"]),
         *(f"{duration(one['cpu_s'][name])}, {times(one['cpu_s'][name] / one['cpu_s']['ours'])}" for name in names),
         f"{100 * one['same_neighbours']:.2f} %")
        for one in result["search"]
    ]  # fmt: skip
    least = min(result["search"], key=lambda one: one["cpu_s"]["faiss"] / one["cpu_s"]["ours"])
    ratio = least["cpu_s"]["faiss"] / least["cpu_s"]["ours"]
    lines = [BARS["faiss"].judge(ratio, f"{least['dim']} features, k = {least['k']}")]
    notes = ""
    if memory := result.get("memory"):
        lines += _memory_lines(memory)
        notes = (f"Memory of {memory['rows']:,} x {memory['dim']} features, k = {memory['k']}, beside the features: "
                 f"{quantity(memory['peak_mib'], 'MiB')} at its peak, {quantity(memory['formula_mib'], 'MiB')} by the "
                 "formula that eval_knn.py shows.")  # fmt: skip
    return Summary(
        "How long does the exact search for neighbours take, and what memory beside the features?",
        "ours, with faiss and without; faiss",
        f"{result['rows']:,} rows, {result['queries']:,} queries, {count(result['threads'], 'thread')}; medians of CPU "
        "time, behind the others' how many times ours it is.",
        [Table(("features", "k", "ours", *names.values(), "same neighbours"), rows)],
        lines,
        notes,
    )


def _memory_lines(memory: dict[str, Any]) -> list[Line]:
    fits = memory["peak_mib"] <= memory["formula_mib"]
    told = f"by the formula, which held at {memory['rows']:,}" if fits else "by the formula, which the peak exceeded"
    line = BARS["memory"].judge(memory["imagenet_formula_mib"], told)
    return [line if fits else replace(line, met=False)]


def main() -> None:
    options = options_of(Options, __doc__)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    about = {**cfg.plain(options), "threads": torch.get_num_threads()}
    result: dict[str, Any] = {**{key: about[key] for key in ("threads", "rows", "queries")}, "options": about}
    if options.memory_rows:
        with tempfile.TemporaryDirectory() as folder:
            result["memory"] = memory(options, Path(folder))
    result["search"] = []
    for dim in options.dims:
        for k in options.ks:
            result["search"].append(compared(options, dim, k))
            print(f"dim {dim}, k {k}: {result['search'][-1]['cpu_s']} CPU s", flush=True)
    write_result(Path(options.out), result, summary)


if __name__ == "__main__":
    cfg.entry(main)
