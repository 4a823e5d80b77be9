"""How the methods scale: ranks measured on this machine, and a model of many GPUs from counted messages.

    python bench/scale.py                                             # measures 1, 2, 4 ranks, then the model
    python bench/scale.py --measure false --step_ms swav=420          # model alone; the step's time as you measured it
    python bench/scale.py --assume_tflops 100                         # or one that follows from an assumed speed

Measured: whole SwAV runs on gloo ranks, the same global batch, the median images/s of their logs. Ranks share this
machine's cores, so that more ranks than cores cannot be faster.

Modelled: bytes and calls of every collective of one step, counted by running the script's own code for 64 ranks
(`clusterssl.plan`; a rank's messages do not depend on their number), at the bandwidth and latency that the flags state,
with nothing overlapping; small messages go along NCCL's trees: from GPU to GPU within a node, then from node to node.
"Own" is what the method adds to data-parallel training, neither gradients nor SyncBatchNorm, and the step waits for it.
Its share of the step is told where the time of a step is given, or follows from an assumed speed of the GPUs; never
otherwise. Memory of the w5 network is counted in the same way.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from ranks import on_ranks
from record import options_of, write_result
from summary import MEGABYTES, Bar, Line, Summary, Table, between, duration, number, percent, quantity, times
from torch.utils.flop_counter import FlopCounterMode

from clusterssl import config as cfg
from clusterssl import dist
from clusterssl.dist import World
from clusterssl.engine import fit
from clusterssl.plan.blueprint import read_script
from clusterssl.plan.network import Network, shares
from clusterssl.plan.rehearsal import rehearse
from clusterssl.plan.watch import Message
from clusterssl.pretrain import assemble

ROOT = Path(__file__).resolve().parents[1]
IMAGES = 1_281_167
MULTI = "--nmb_crops 2 6 --size_crops 224 96 --min_scale_crops 0.14 0.05 --max_scale_crops 1 0.14"
METHODS = {
    "swav": ("main_swav.py", MULTI),
    "swav, queue": ("main_swav.py", f"{MULTI} --batch_size 32 --queue_length 262144 --epoch_queue_starts 0"),
    "deepclusterv2": ("main_deepclusterv2.py", MULTI),
    "sela-v2": ("main_sela.py", MULTI),
    "sela": ("main_sela.py", "--version 1 --arch resnet50 --hc 10"),
    "deepcluster": ("main_deepcluster.py", "--arch resnet50 --nmb_cluster 10000"),
    "selfclassifier": ("main_selfclassifier.py", "--batch_size 64"),
}
"""as published or, for what was published on other networks, on a ResNet-50"""
W5 = "--arch resnet50w5 --hidden_mlp 10240 --nmb_crops 2 4 --size_crops 224 96 --min_scale_crops 0.08 0.08 " \
     "--max_scale_crops 1 0.14"  # fmt: skip
SMALL = [
    *("--data_path", "synthetic:1024:36x36", "--nmb_crops", "2", "--size_crops", "32", "--arch", "conv4"),
    *("--nmb_prototypes", "300", "--workers", "0", "--log_freq", "4", "--device", "cpu", "--epochs", "2"),
]
BARS = {
    "own": Bar("the method's own messages at 64 GPUs, the largest share of all methods", 2, "% of the step", most=True)
}


@dataclass(frozen=True)
class Options:
    """Comparison."""

    measure: bool = True
    """run ranks on this machine"""
    ranks: tuple[int, ...] = (1, 2, 4)
    global_batch: int = 64
    """of the ranks measured"""
    repeats: int = 3
    gpus: tuple[int, ...] = (8, 64, 512, 4096)
    """in nodes of `gpus_of_a_node`"""
    gpus_of_a_node: int = 8
    bandwidth_gbps: float = 100.0
    """of a node's network in 10^9 bits/s"""
    latency_us: float = 20.0
    """from one node to another in microseconds"""
    local_latency_us: float = 2.0
    """from one GPU of a node to the next in microseconds"""
    step_ms: tuple[str, ...] = ()
    """measured time of a step without communication, by method: swav=420"""
    assume_tflops: float = 0.0
    """10^12 operations a second that a GPU is assumed to do in training; 0: no assumption"""
    w5_batches: tuple[int, ...] = (4, 8, 12, 16, 24)
    """images of a rank in the memory plan of the w5 network"""
    out: str = "runs/bench/scale.json"


def short_run(global_batch: int) -> float:
    """Images a second of a short run on these ranks, all together; the first epoch warms up."""
    with tempfile.TemporaryDirectory() as own:
        folder = dist.broadcast_object(own)
        words = [*SMALL, "--batch_size", str(global_batch // dist.size()), "--dump_path", folder]
        plan = read_script(ROOT / "main_swav.py", words, 1, dist.size())
        world = World(dist.rank(), dist.size())
        fit(assemble(plan.name, plan.config, world, plan.make_model, plan.make_method, **plan.more))
        dist.barrier()
        records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        dist.barrier()
    return median(r["images_per_s"] for r in records if r.get("epoch") == 1)


def measured(options: Options) -> dict[str, Any]:
    """Median, quartiles and speed-up of whole runs on gloo ranks that take turns."""
    rates: dict[int, list[float]] = {ranks: [] for ranks in options.ranks}
    for _ in range(options.repeats):
        for ranks in options.ranks:
            rates[ranks].append(on_ranks(short_run, ranks, options.global_batch)[0])
            print(f"{ranks} ranks: {rates[ranks][-1]:.0f} images/s", flush=True)
    alone = median(rates[options.ranks[0]])
    return {
        str(n): {"images_per_s": found, "median_images_per_s": median(found), "over_first": median(found) / alone}
        for n, found in rates.items()
    }


def step_seconds(options: Options, name: str, flops: float) -> tuple[float | None, str]:
    """Time of a step without communication, and where it comes from."""
    given = dict(word.partition("=")[::2] for word in options.step_ms)
    if name in given:
        return float(given[name]) / 1e3, "given"
    if options.assume_tflops:
        return flops / options.assume_tflops / 1e12, f"assumed: {options.assume_tflops:g} TFLOP/s"
    return None, "unknown"


def counted(name: str) -> tuple[list[Message], int]:
    """Messages of one rank and step of a method, and the floating point operations; both are those of 64 ranks."""
    script, flags = METHODS[name]
    counter = FlopCounterMode(display=False)
    with counter:
        done = rehearse(read_script(ROOT / script, ["--data_path", "x", *flags.split()], 8, 8), IMAGES, 64, gpu=True)
    return done.messages, counter.get_total_flops()


def modelled(options: Options, name: str, messages: list[Message], flops: int, gpus: int) -> dict[str, Any]:
    """One step of a method on so many GPUs."""
    network = Network(options.bandwidth_gbps, options.latency_us, options.gpus_of_a_node, options.local_latency_us)
    found = shares(messages, gpus, network)
    seconds, source = step_seconds(options, name, flops)
    own, beside = (sum(s.seconds for s in found if s.own and s.waited == waited) for waited in (True, False))
    whole = sum(s.seconds for s in found)
    share = None if seconds is None else own / (seconds + own)
    return {
        "gpus": gpus, "own_ms": 1e3 * own, "own_beside_ms": 1e3 * beside, "all_ms": 1e3 * whole,
        "step_ms": seconds and 1e3 * seconds, "step_from": source, "own_share": share,
        "teraflop_of_a_step": flops / 1e12, "messages": [vars(s) for s in found],
    }  # fmt: skip


def w5_memory(batches: Sequence[int]) -> list[dict[str, Any]]:
    """Bytes on one of 64 GPUs by images of a rank."""
    found = []
    for batch in batches:
        words = ["--data_path", "x", *W5.split(), "--batch_size", str(batch)]
        done = rehearse(read_script(ROOT / "main_swav.py", words, 8, 8), IMAGES, 64, gpu=True)
        found.append({"batch_size": batch, "peak_gb": done.peak / 1e9, **{k: v / 1e9 for k, v in done.memory.items()}})
    return found


def tables(result: dict[str, Any]) -> list[Table]:
    """Ranks measured here, shares of the modelled step, and memory of the w5 network."""
    found, rows = [], []
    if "measured" in result:
        for ranks, one in result["measured"].items():
            low, high = (pick(one["images_per_s"]) for pick in (min, max))
            rows.append((ranks, number(one["median_images_per_s"]) + between(low, high), times(one["over_first"])))
        found.append(Table(("ranks", "images/s of all", "over the first"), rows, "Measured, gloo on shared cores:"))
    model = result["model"]
    gpus = [row["gpus"] for row in next(iter(model.values()))]
    rows = []
    for name, steps in model.items():
        cells = [duration(row["own_ms"] / 1e3) + (f", {percent(row['own_share'])}" if row["own_share"] else "")
                 for row in steps]  # fmt: skip
        step = steps[0]["step_ms"]
        rows.append((name, duration(step / 1e3) if step else "unknown", *cells))
    title = "Computed: own messages of a step, and their share of it:"
    found.append(Table(("method", "step alone", *(f"{n} GPUs" for n in gpus)), rows, title))
    keys = ("parameters", "gradients", "optimiser")
    rows = [(row["batch_size"], *(quantity(1e3 * MEGABYTES * gigabytes, "MiB")
                                for gigabytes in (row["peak_gb"], sum(row[key] for key in keys))))
            for row in result["w5"]]  # fmt: skip
    title = "Counted: RN50w5, 2 x 224 + 4 x 96 px, bf16, on one of 64 GPUs, without CUDA's context and fragmentation:"
    return [*found, Table(("images of a rank", "peak memory", "weights, gradients, momentum"), rows, title)]


def summary(result: dict[str, Any]) -> Summary:
    """The result in words."""
    options = result["options"]
    shares = {name: row["own_share"] for name, rows in result["model"].items()
              for row in rows if row["gpus"] == 64 and row["own_share"] is not None}  # fmt: skip
    lines: list[Line] = []
    if shares:
        worst = max(shares, key=lambda name: shares[name])
        source = result["model"][worst][0]["step_from"]
        lines.append(BARS["own"].judge(100 * shares[worst], f"{worst}; computed, time of the step {source}"))
    return Summary(
        "What do the methods add to the messages of data-parallel training, and how do ranks scale here?",
        "each method's own messages on 8 to 4096 GPUs, by a model",
        f"Model: {options['bandwidth_gbps']:g} Gb/s and {options['latency_us']:g} us between nodes of "
        f"{options['gpus_of_a_node']} GPUs, {options['local_latency_us']:g} us within, nothing overlapped. Bytes and "
        "calls are counted in code; no GPU was used.",
        tables(result),
        lines,
    )


def main() -> None:
    options = options_of(Options, __doc__)
    result: dict[str, Any] = {"options": cfg.plain(options)}
    if options.measure:
        result["measured"] = measured(options)
    result["model"] = {}
    for name in METHODS:
        messages, flops = counted(name)
        result["model"][name] = [modelled(options, name, messages, flops, gpus) for gpus in options.gpus]
    result["w5"] = w5_memory(options.w5_batches)
    write_result(Path(options.out), result, summary)


if __name__ == "__main__":
    cfg.entry(main)
