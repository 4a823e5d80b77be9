"""Spherical k-means: ours beside the algorithm that DeepCluster-v2 published and faiss, in one process on equal data.

    python bench/kmeans.py                         # all cores
    python bench/kmeans.py --threads 1
    python bench/kmeans.py --data gauss            # features without any clusters
    python bench/kmeans.py --device cuda --rows 1000000
    python bench/kmeans.py --rows 1000000 --clusters 10000 --iterations 3 --repeats 1 --leave_out published

The published algorithm, written anew from its description: all dot products as one matrix, the maximum of each row,
then a loop over the clusters that selects the rows of each and sums them. Selecting by one sort of the labels, as here,
is kinder to it than a search for every cluster. The systems take turns; the time of an iteration is that of a whole
clustering, last assignment included, over its iterations, and the median of the repeats counts. CPU time, that of all
threads together, depends less on what else the machine does.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
import torch.nn.functional as F
from gpu import kernels, products_written
from record import options_of, write_result
from summary import GPU, Bar, Summary, Table, count, duration, often, times
from torch import Tensor

from clusterssl import config as cfg
from clusterssl.cluster import nearest
from clusterssl.cluster.kmeans import KMeansOptions, spherical_kmeans
from clusterssl.cluster.nearest import Target, search_torch

BARS = {
    "published": Bar("published algorithm's time of an iteration over ours", 1.8),
    "faiss.Kmeans": Bar("faiss's time of an iteration over ours", 3.0),
    "memory": Bar("memory that ours takes on a GPU over that of the distances of all rows", 1, most=True, needs=GPU),
    "written": Bar("products of rows and centroids that a search writes out on a GPU", 0, "", most=True, needs=GPU),
}


@dataclass(frozen=True)
class Options:
    """Comparison."""

    rows: int = 50_000
    dim: int = 128
    clusters: int = 3000
    iterations: int = 10
    repeats: int = 5
    data: Literal["groups", "gauss"] = "groups"
    """rows around 2000 random centres, or without any structure"""
    threads: int = 0
    """0: all cores"""
    device: Literal["cpu", "cuda"] = "cpu"
    leave_out: tuple[str, ...] = ()
    """systems; of the published one the matrix of rows x clusters must fit into memory"""
    seed: int = 0
    out: str = "runs/bench/kmeans.json"


def features(options: Options) -> Tensor:
    """Unit rows [N, D]."""
    generator = torch.Generator().manual_seed(options.seed)
    x_ND = torch.randn(options.rows, options.dim, generator=generator)
    if options.data == "groups":
        centres = torch.randn(2000, options.dim, generator=generator)
        x_ND = centres[torch.randint(2000, (options.rows,), generator=generator)] + 0.7 * x_ND
    return F.normalize(x_ND, dim=1).to(options.device)


def published(x_ND: Tensor, centroids_KD: Tensor, iterations: int) -> Tensor:
    """Centroids by the published algorithm, after the last assignment."""
    for iteration in range(iterations + 1):
        labels_N = (x_ND @ centroids_KD.T).max(1).indices
        if iteration == iterations:
            break
        counts = torch.bincount(labels_N, minlength=len(centroids_KD))
        members = labels_N.argsort(stable=True).split(counts.tolist())
        sums_KD = torch.zeros_like(centroids_KD)
        for k, rows in enumerate(members):
            if len(rows) > 0:
                sums_KD[k] = x_ND[rows].sum(0)
        means_KD = sums_KD / counts.clamp(min=1)[:, None]
        centroids_KD = F.normalize(torch.where(counts[:, None] > 0, means_KD, centroids_KD), dim=1)
    return centroids_KD


def ours(x_ND: Tensor, centroids_KD: Tensor, iterations: int, backend: Literal["torch", "faiss"] = "torch") -> Tensor:
    """Centroids by `spherical_kmeans`, empty ones kept as the published algorithm does."""
    options = KMeansOptions(kmeans_iters=iterations, kmeans_empty="keep", kmeans_backend=backend)
    return spherical_kmeans(x_ND, centroids_KD, options).centroids_KD


def by_products(x_ND: Tensor, centroids_KD: Tensor, iterations: int) -> Tensor:
    """Ours without the kernel that writes no scores: matrix products and a search for their maxima, by blocks."""
    before, nearest.for_kernels = nearest.for_kernels, lambda *_: False
    try:
        return ours(x_ND, centroids_KD, iterations)
    finally:
        nearest.for_kernels = before


def faiss_kmeans(x_ND: Tensor, centroids_KD: Tensor, iterations: int) -> Tensor:
    """Centroids by faiss.Kmeans."""
    import faiss

    found = faiss.Kmeans(
        x_ND.shape[1], len(centroids_KD), niter=iterations, spherical=True, min_points_per_centroid=1,
        max_points_per_centroid=len(x_ND),
    )  # fmt: skip
    found.train(x_ND.cpu().numpy(), init_centroids=centroids_KD.cpu().numpy())
    return torch.from_numpy(found.centroids).to(x_ND)


def systems(options: Options) -> dict[str, Callable[[Tensor, Tensor, int], Tensor]]:
    """What is compared; faiss where it is installed."""
    found: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {"ours": ours, "published": published}
    if options.device == "cuda":
        found["ours by products"] = by_products
    with contextlib.suppress(ImportError):
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        found |= {"ours with --kmeans_backend faiss": partial(ours, backend="faiss"), "faiss.Kmeans": faiss_kmeans}
    unknown = set(options.leave_out) - (set(found) - {"ours"})
    cfg.require(not unknown, f"--leave_out {' '.join(sorted(unknown))}: there are {', '.join(found)}; ours has to stay")
    return {name: system for name, system in found.items() if name not in options.leave_out}


def inertia(x_ND: Tensor, centroids_KD: Tensor) -> float:
    """Sum of the squared distances of all rows to their nearest centroids, in float64."""
    parts = (part.double() @ centroids_KD.double().T for part in x_ND.split(4096))
    return float(sum((2 - 2 * part.max(1).values).sum() for part in parts))


def watched() -> int:
    """Begin to watch the GPU's memory; bytes in use."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def measure(options: Options) -> dict[str, dict]:
    """Seconds of an iteration by the clock and of all cores, each repeat of each system, and the inertia it reaches."""
    x_ND = features(options)
    order = torch.randperm(options.rows, generator=torch.Generator().manual_seed(1))
    start_KD = x_ND[order[: options.clusters].to(options.device)]
    found: dict[str, dict] = {}
    for repeat in range(options.repeats):
        for name, run in systems(options).items():
            one = found.setdefault(name, {"seconds": [], "cpu_seconds": []})
            held = watched() if options.device == "cuda" else 0
            began, worked = time.perf_counter(), time.process_time()
            centroids_KD = run(x_ND, start_KD.clone(), options.iterations)
            if options.device == "cuda":
                torch.cuda.synchronize()
                one["gpu_bytes"] = torch.cuda.max_memory_allocated() - held
            one["seconds"].append((time.perf_counter() - began) / options.iterations)
            one["cpu_seconds"].append((time.process_time() - worked) / options.iterations)
            one["inertia"] = one.get("inertia") or inertia(x_ND, centroids_KD)
            print(f"{repeat + 1}/{options.repeats} {name}: {one['seconds'][-1]:.3f} s an iteration", flush=True)
    return found


def written(options: Options) -> int:
    """Products of rows and centroids that our search writes to the memory of the GPU."""
    x_ND = features(options)
    target = Target(x_ND[: options.clusters].clone())
    return products_written(kernels(lambda: list(search_torch(x_ND, target))))


def summary(result: dict[str, Any]) -> Summary:
    """The result in words."""
    options, found = result["options"], result["systems"]
    rows = [
        (name, duration(one["median_seconds"]), times(one["seconds_over_ours"]), duration(one["median_cpu_seconds"]),
         times(one["cpu_seconds_over_ours"]), f"{one['inertia_over_ours']:.4f}")
        for name, one in found.items()
    ]  # fmt: skip
    on_cpu = options["device"] == "cpu"
    judged = [
        BARS[name].judge(found[name]["seconds_over_ours"], f"CPU time {times(found[name]['cpu_seconds_over_ours'])}")
        for name in ("published", "faiss.Kmeans")
        if name in found and (on_cpu or name == "published")
    ]
    if "gpu_bytes" in found["ours"]:
        distances = 4 * options["rows"] * options["clusters"]
        judged.append(BARS["memory"].judge(found["ours"]["gpu_bytes"] / distances))
    if "written" in result:
        judged.append(BARS["written"].judge(result["written"]))
    data = "rows around 2000 centres" if options["data"] == "groups" else "rows without any clusters"
    where = count(options["threads"], "thread") if on_cpu else "GPU"
    return Summary(
        "How long does an iteration of spherical k-means take, and how good are the clusters?",
        f"ours; published loop, faiss; {options['rows']:,} rows, K = {options['clusters']:,}",
        f"{options['rows']:,} x {options['dim']}, {data}, K = {options['clusters']:,}, {options['iterations']} "
        f"iterations, {where}; {often(options['repeats'], '')}.",
        [Table(("", "an iteration", "over ours", "CPU time", "over ours", "inertia over ours"), rows)],
        judged,
    )


def main() -> None:
    options = options_of(Options, __doc__)
    if options.threads:
        torch.set_num_threads(options.threads)
    found = measure(options)
    for one in found.values():
        for kind in ("seconds", "cpu_seconds"):
            one[f"median_{kind}"] = median(one[kind])
            one[f"{kind}_over_ours"] = one[f"median_{kind}"] / found["ours"][f"median_{kind}"]
        one["inertia_over_ours"] = one["inertia"] / found["ours"]["inertia"]
    about = {**cfg.plain(options), "threads": torch.get_num_threads()}
    more = {"written": written(options)} if options.device == "cuda" else {}
    write_result(Path(options.out), {"options": about, "systems": found, **more}, summary)


if __name__ == "__main__":
    cfg.entry(main)
