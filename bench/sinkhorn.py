"""Sinkhorn assignments of a batch: ours beside the published formula, the log domain and lightly, on equal scores.

    python bench/sinkhorn.py
    python bench/sinkhorn.py --threads 2 --ranks 1
    python bench/sinkhorn.py --device cuda --ranks 1 --repeats 50

The published formula, written anew from its description, keeps Q = exp(scores / epsilon) and divides it in place by its
total, then three times by the sums of the prototypes, their number, the sums of the images, and the number of these.
The log domain alternates logsumexp over both. The systems take turns on fresh copies of the scores, medians count.
There are two crops of each image, as in SwAV; ours assigns both at once, the others one after the other. "ours" takes
the memory of the scores, as training does; "ours, kept" leaves them. Before anything is timed every result
is compared with the formula in float64. Memory that was freed is kept for the next call, as in training.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
import torch.nn.functional as F
from gpu import IN_A_ROW, kernels
from ranks import on_ranks
from record import options_of, write_result
from summary import GPU, Bar, Line, Summary, Table, count, duration, often, spread, times
from timing import in_turns
from torch import Tensor

from clusterssl import config as cfg
from clusterssl import dist
from clusterssl.cluster.sinkhorn import sinkhorn
from clusterssl.pretrain import keep_freed_memory

System = Callable[[Tensor, float, int], Tensor]
COPY = "copying the scores"
CACHE = 64 * 2**20
"""bytes, more than a GPU's last cache has"""
BARS = {
    "every": Bar("published form's time over ours, the smallest ratio over all ranks and B", 2.2),
    "small": Bar("published form's time over ours, the smallest ratio over all ranks and B up to 2048", 3.5),
    "floor": Bar(
        "time on a GPU over that of reading the scores 2 x iterations + 2 times, scores larger than its cache",
        1.5,
        most=True,
        needs=GPU,
    ),
    "launches": Bar(
        "how many different numbers of kernels the batch sizes launch on a GPU; 1: all B the same",
        1,
        "",
        most=True,
        needs=GPU,
    ),
}


@dataclass(frozen=True)
class Options:
    """Comparison."""

    batches: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192)
    """images over all ranks"""
    ranks: tuple[int, ...] = (1, 2, 4)
    crops: int = 2
    """problems of so many rows"""
    prototypes: int = 3000
    epsilon: float = 0.05
    iterations: int = 3
    repeats: int = 15
    threads: int = 1
    """of a process alone; several ranks have one each"""
    device: Literal["cpu", "cuda"] = "cpu"
    out: str = "runs/bench/sinkhorn.json"


def published(scores_BK: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Assignments by the published formula over all ranks (Caron et al. 2020, equations 3 to 5)."""
    q_KB = torch.exp(scores_BK / epsilon).T
    prototypes, batch = q_KB.shape[0], q_KB.shape[1] * dist.size()
    q_KB /= dist.all_reduce_(q_KB.sum())
    for _ in range(iterations):
        q_KB /= dist.all_reduce_(q_KB.sum(dim=1, keepdim=True))
        q_KB /= prototypes
        q_KB /= q_KB.sum(dim=0, keepdim=True)
        q_KB /= batch
    q_KB *= batch
    return q_KB.T


def log_domain(scores_BK: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Assignments by alternating logsumexp, one rank."""
    log_q_BK = scores_BK / epsilon
    for _ in range(iterations):
        log_q_BK -= log_q_BK.logsumexp(dim=0, keepdim=True)
        log_q_BK -= log_q_BK.logsumexp(dim=1, keepdim=True)
    return log_q_BK.exp_()


def ours(scores_ABK: Tensor, epsilon: float, iterations: int, overwrite: bool = True) -> Tensor:
    """Assignments by `clusterssl.cluster.sinkhorn`."""
    return sinkhorn(scores_ABK, epsilon, iterations, bound=1.0, overwrite=overwrite)


def one_by_one(system: System) -> Callable[[Tensor, float, int], list[Tensor]]:
    """Assignments of several crops by a system that knows one."""
    return lambda scores_ABK, epsilon, iterations: [system(x, epsilon, iterations) for x in scores_ABK]


def systems() -> dict[str, Callable[[Tensor, float, int], Any]]:
    """What is compared; lightly where it is installed."""
    found: dict[str, Callable[[Tensor, float, int], Any]] = {
        "ours": ours, "ours, kept": partial(ours, overwrite=False), "published": one_by_one(published),
    }  # fmt: skip
    if dist.size() == 1:
        found["log domain"] = one_by_one(log_domain)
    try:
        from lightly.loss.swav_loss import sinkhorn as of_lightly
    except ImportError:
        return found
    return {**found, "lightly": one_by_one(lambda s, e, n: of_lightly(s, n, e, gather_distributed=dist.size() > 1))}


def scores(rows: int, options: Options) -> Tensor:
    """This rank's cosines of random embeddings with random prototypes, 128 dimensions, [A, B, K]."""
    generator = torch.Generator().manual_seed(rows)
    shapes = ((options.crops, rows, 128), (options.prototypes, 128))
    z_ABD, c_KD = (F.normalize(torch.randn(shape, generator=generator), dim=-1) for shape in shapes)
    first, end = dist.share(rows)
    return (z_ABD[:, first:end] @ c_KD.T).to(options.device)


def measure(options: Options, rows: int) -> dict[str, dict[str, float]]:
    """Seconds of each system on this rank's share of `rows`."""
    torch.set_num_threads(1 if dist.size() > 1 else options.threads)
    given = scores(rows, options)
    expected = one_by_one(published)(given.double(), options.epsilon, options.iterations)
    calls = {}
    for name, system in systems().items():
        assigned = system(given.clone(), options.epsilon, options.iterations)
        error = max(float((q - wanted).abs().max()) for q, wanted in zip(assigned, expected, strict=True))
        cfg.require(error < 1e-5, f"{name} differs from the formula by {error:.2g}: nothing to time")
        calls[name] = partial(_run, system, options)
    if options.device == "cuda":
        calls[COPY] = torch.clone
    row = IN_A_ROW if options.device == "cuda" else 1
    return {name: one._asdict() for name, one in in_turns(calls, options.repeats, 2, given.clone, row).items()}


def _run(system: Callable[[Tensor, float, int], Any], options: Options, scores_ABK: Tensor) -> Any:
    return system(scores_ABK, options.epsilon, options.iterations)


def launches(options: Options, rows: int) -> int:
    """Kernels of a call on a GPU."""
    given = scores(rows, options)
    copies = kernels(lambda: given.clone())
    return len(kernels(lambda: ours(given.clone(), options.epsilon, options.iterations))) - len(copies)


def judged(options: dict[str, Any], rows: list[dict[str, Any]]) -> list[Line]:
    """The figures that count; on a GPU a copy reads and writes the scores once each."""
    lines: list[Line] = []
    if options["device"] == "cuda":
        reads = 2 * options["iterations"] + 2
        found = {row["batch"]: row["seconds"]["ours"]["median"] / (reads * row["seconds"][COPY]["median"] / 2)
                 for row in rows if 4 * options["crops"] * row["batch"] * options["prototypes"] > CACHE}  # fmt: skip
        launched = {row["launches"] for row in rows if "launches" in row}
        if found:
            lines.append(BARS["floor"].judge(*max((ratio, f"B = {batch}") for batch, ratio in found.items())))
        return [*lines, BARS["launches"].judge(len(launched), f"{', '.join(map(str, sorted(launched)))} launches")]
    for key, most in (("every", max(row["batch"] for row in rows)), ("small", 2048)):
        if of_size := [row for row in rows if row["batch"] <= most]:
            least = min(of_size, key=lambda row: row["published_over_ours"])
            sizes = [row["batch"] for row in of_size]
            place = f"{count(least['ranks'], 'rank')}, B = {least['batch']}; rows of B = {min(sizes)} to {max(sizes)}"
            lines.append(BARS[key].judge(least["published_over_ours"], place))
    return lines


def summary(result: dict[str, Any]) -> Summary:
    """The result in words."""
    options, rows = result["options"], result["rows"]
    peers = [name for name in rows[0]["seconds"] if name != "ours"]
    table = []
    for row in rows:
        found, ours = row["seconds"], row["seconds"]["ours"]
        cells = [f"{duration(found[name]['median'])}, {times(found[name]['median'] / ours['median'])}"
                 if name in found else "" for name in peers]  # fmt: skip
        table.append((row["ranks"], row["batch"], spread(ours), *cells))
    return Summary(
        "How long does SwAV's assignment of a batch take, and how much longer does it take others?",
        "ours; published formula, log domain, lightly",
        f"{options['crops']} crops of B images, K = {options['prototypes']}, {options['iterations']} iterations, "
        f"{options['device']}; one rank has {count(options['threads'], 'thread')}, several have one each; "
        f"{often(options['repeats'])}; behind the others' time how many times ours it is.",
        [Table(("ranks", "B", "ours", *peers), table)],
        judged(options, rows),
        '"ours" takes the memory of the scores, as training does; "ours, kept" leaves them.',
    )


def main() -> None:
    options = options_of(Options, __doc__)
    keep_freed_memory()
    rows: list[dict[str, Any]] = []
    for world_size in options.ranks:
        for batch in options.batches:
            found = on_ranks(measure, world_size, options, batch)
            slowest = max(found, key=lambda one: one["ours"]["median"])
            ratio = slowest["published"]["median"] / slowest["ours"]["median"]
            rows.append({"ranks": world_size, "batch": batch, "seconds": slowest, "published_over_ours": ratio})
            if options.device == "cuda" and world_size == 1:
                rows[-1]["launches"] = launches(options, batch)
            print(f"{world_size} rank(s), B {batch}: published {ratio:.2f} x ours", flush=True)
    write_result(Path(options.out), {"options": cfg.plain(options), "rows": rows}, summary)


if __name__ == "__main__":
    cfg.entry(main)
