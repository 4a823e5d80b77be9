"""SeLa's balanced labels: ours beside the published rule on a dense matrix in float64, in turns on equal logits.

    python bench/transport.py                    # one thread
    python bench/transport.py --threads 0        # all cores
    python bench/transport.py --million true     # also the memory of 1.28 million images, some minutes

Two kinds of logits: `normal`, scale times a standard normal draw, and `peaked`, those of a network that is sure of
itself, with a few large clusters and many small ones. The published rule, written anew from its description, starts at
the matrix of probabilities; raising it to the power lambda counts, as it does there; ours starts at the logits in
float32. Both end at the same tolerance on the sum over images of |c_old / c_new - 1|: the published one, 0.1, and 1e-3
of the number of images. Ours reaches it in an upper bound of that sum. Labels are compared with those of the published
rule at 0.1, and so are the published rule's own at 1e-3. The systems take turns; CPU time counts, which does not depend
on what else the machine does, and wall-clock time stands beside it.

The memory is the peak of a process of its own, with nothing but features, head and the transport in it.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import numpy as np
import torch
from numpy.typing import NDArray
from record import options_of, write_result
from summary import MEGABYTES, Bar, Summary, Table, count, duration, often, quantity, times
from torch import Tensor

from clusterssl import config as cfg
from clusterssl.cluster.transport import Plan, TransportOptions, memory_estimate, transport

LAMBDA = 25.0
CASES = {
    "normal, scale 0.4": (10_000, 1000, 0.4, 0.0),
    "normal, scale 1": (10_000, 1000, 1.0, 0.0),
    "normal, scale 3": (10_000, 1000, 3.0, 0.0),
    "peaked, height 6": (20_000, 128, 0.4, 6.0),
    "peaked, height 12": (20_000, 128, 1.0, 12.0),
}
"""images, clusters, scale of the noise, height of the peaks"""
BARS = {
    "time": Bar("published rule's CPU time over ours, the smallest ratio over all logits and tolerances", 8),
    "labels": Bar(
        "labels equal to those of the published rule, the smallest share over all logits and tolerances", 99.9, "%"
    ),
    "memory": Bar("memory in all of 1.28 M images, K = 3000, 128 features", 1500 * MEGABYTES, "MiB", most=True),
}
MILLION = 1_281_167


@dataclass(frozen=True)
class Options:
    """Comparison."""

    repeats: int = 3
    threads: int = 1
    """0: all cores"""
    million: bool = False
    """also measure the memory of a few passes at N = 1.28 million"""
    measure: tuple[int, ...] = ()
    """images, clusters, dimension, most passes: only run that and print this process's peak memory"""
    out: str = "runs/bench/transport.json"


def logits(images: int, clusters: int, scale: float, height: float, seed: int = 1) -> NDArray[np.float64]:
    """Logits [N, K] of one case."""
    random = np.random.RandomState(seed)
    drawn_NK = random.standard_normal((images, clusters)) * scale
    if height:
        size_K = 1 / np.arange(1, clusters + 1) ** 0.7
        best_N = random.choice(clusters, images, p=size_K / size_K.sum())
        drawn_NK[np.arange(images), best_N] += height * random.uniform(0.3, 1, images)
    return drawn_NK


def published(probabilities_NK: Tensor, tol: float) -> tuple[Tensor, int]:
    """Labels and number of iterations of the published rule, float64."""
    m_NK = probabilities_NK**LAMBDA
    images, clusters = m_NK.shape
    c_N, error, iteration = m_NK.new_full((images,), 1 / images), float("inf"), 0
    while error > tol:
        r_K = 1 / (clusters * (c_N @ m_NK))
        new_N = 1 / (images * (m_NK @ r_K))
        if iteration % 10 == 0:
            error = float((c_N / new_N - 1).abs().nansum())
        c_N, iteration = new_N, iteration + 1
    return (m_NK * r_K).argmax(1), iteration


def ours(logits_NK: Tensor, tol: float) -> Plan:
    """Labels by `transport`."""
    return transport(logits_NK, sharpness=LAMBDA, options=TransportOptions(sinkhorn_tol=tol))


def compare(images: int, clusters: int, scale: float, height: float, repeats: int) -> dict[str, Any]:
    """Both systems on one case at both tolerances."""
    drawn_NK = torch.from_numpy(logits(images, clusters, scale, height))
    probabilities_NK, logits_NK = torch.softmax(drawn_NK, 1), drawn_NK.float()
    expected_N = published(probabilities_NK, 0.1)[0]
    rows = {}
    for name, tol in {"0.1": 0.1, "1e-3 N": 1e-3 * images}.items():
        seconds: dict[str, list[tuple[float, float]]] = {"published": [], "ours": []}
        for _ in range(repeats):
            their_N, iterations = timed(published, probabilities_NK, tol, seconds["published"])
            plan = timed(ours, logits_NK, tol, seconds["ours"])
        cpu, wall = ({system: median(x[i] for x in times) for system, times in seconds.items()} for i in range(2))
        counts_K = torch.bincount(plan.labels_N, minlength=clusters) * clusters / images
        rows[name] = {
            "cpu_seconds": cpu, "wall_seconds": wall, "all_cpu_and_wall": seconds,
            "times_faster": cpu["published"] / cpu["ours"], "times_faster_wall": wall["published"] / wall["ours"],
            "iterations_published": iterations, "passes_ours": plan.passes, "error_bound_ours": plan.error,
            "equal_labels": float((plan.labels_N == expected_N).double().mean()),
            "equal_labels_published": float((their_N == expected_N).double().mean()),
            "largest_error_of_a_cluster_in_the_plan": plan.imbalance,
            "clusters_by_labels": [float(counts_K.min()), float(counts_K.max())],
        }  # fmt: skip
    return rows


def timed(system: Callable[[Tensor, float], Any], matrix_NK: Tensor, tol: float, seconds: list) -> Any:
    """What `system` returns; CPU and wall-clock seconds are added to the list."""
    cpu, wall = time.process_time(), time.perf_counter()
    found = system(matrix_NK, tol)
    seconds.append((time.process_time() - cpu, time.perf_counter() - wall))
    return found


def measured(images: int, clusters: int, dim: int, passes: int) -> dict[str, float]:
    """Peak memory in MiB of a process that labels random features."""
    command = [sys.executable, __file__, "--measure", *map(str, (images, clusters, dim, passes))]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(printed.splitlines()[-1])


def measure(images: int, clusters: int, dim: int, passes: int) -> None:
    """In that process: run and print."""
    generator = torch.Generator().manual_seed(0)
    before = peak_mb()
    features_ND = torch.randn(images, dim, generator=generator)
    weight_KD = torch.randn(clusters, dim, generator=generator) * 0.1
    with_features = peak_mb()
    options = TransportOptions(sinkhorn_max_iterations=passes)
    plan = transport(features_ND, weight_KD, sharpness=LAMBDA, options=options)
    found = {"libraries": before, "with_features": with_features, "peak": peak_mb()}
    formula = memory_estimate(images, clusters, dim) / 2**20
    dense = 8 * images * clusters / 2**20
    print(json.dumps({**found, "formula_without_libraries": formula, "dense_float64": dense, "passes": plan.passes}))


def peak_mb() -> float:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def summary(result: dict[str, Any]) -> Summary:
    """The result in words."""
    rows = {f"{name}, tolerance {tol}": row for name, case in result["systems"].items() for tol, row in case.items()}
    table = [
        (name, duration(row["cpu_seconds"]["ours"]), duration(row["cpu_seconds"]["published"]),
         times(row["times_faster"]), times(row["times_faster_wall"]), row["passes_ours"], row["iterations_published"],
         f"{100 * row['equal_labels']:.3f} %")
        for name, row in rows.items()
    ]  # fmt: skip
    head = ("logits", "ours", "published", "over ours", "by the clock", "our passes", "its iterations", "equal labels")
    slowest = min(rows, key=lambda name: rows[name]["times_faster"])
    lines = [BARS["time"].judge(rows[slowest]["times_faster"], slowest),
             BARS["labels"].judge(100 * min(row["equal_labels"] for row in rows.values()))]  # fmt: skip
    memory = result["memory_mb"]
    lines += [BARS["memory"].judge(found["peak"])
              for name, found in memory.items() if name.startswith(str(MILLION))]  # fmt: skip
    held = [(name, *(quantity(found[key], "MiB") for key in ("with_features", "peak", "dense_float64")))
            for name, found in memory.items()]  # fmt: skip
    options = result["options"]
    return Summary(
        "How long do SeLa's balanced labels take, do they equal the published ones, and what memory do they need?",
        "ours; published rule on a dense float64 matrix",
        f"lambda = {options['lambda']:g}, {count(options['threads'], 'thread')}; CPU time, "
        f"{often(options['repeats'], '')}. The published tolerance is 0.1.",
        [Table(head, table),
         Table(("", "libraries and features", "peak in all", "dense float64 matrix alone"), held, "Memory:")],
        lines,
    )  # fmt: skip


def main() -> None:
    options = options_of(Options, __doc__)
    if options.measure:
        return measure(*options.measure)
    if options.threads:
        torch.set_num_threads(options.threads)
    sizes = [(100_000, 3000, 128, 2000)] + [(MILLION, 3000, 128, 4)] * options.million
    memory = {f"{size[0]} x {size[1]}, D = {size[2]}": measured(*size) for size in sizes}
    cases = {}
    for name, case in CASES.items():
        cases[name] = compare(*case, options.repeats)
        print(f"{name}: done", flush=True)
    about = {**cfg.plain(options), "threads": torch.get_num_threads(), "cases": CASES, "lambda": LAMBDA}
    write_result(Path(options.out), {"options": about, "memory_mb": memory, "systems": cases}, summary)


if __name__ == "__main__":
    cfg.entry(main)
