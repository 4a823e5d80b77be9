"""What a training will need, before it is submitted: memory, network, disk, time, and whether it can work at all.

    python -m clusterssl.plan --nodes 8 --ngpus 8 --num_images 1281167 main_swav.py --data_path x --nmb_crops 2 6 ...

What follows the script's name are its flags, as it would get them. One step is run on tensors without memory, by the
script's own code: no GPU is needed, and with --num_images no images. Bytes of messages and tensors are counted, times
follow from the network that the flags state; images/s come from bench/results or are unknown.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clusterssl import config as cfg
from clusterssl.data import open_source
from clusterssl.errors import UserError
from clusterssl.plan.blueprint import Blueprint, read_script
from clusterssl.plan.measured import fitting
from clusterssl.plan.network import Network
from clusterssl.plan.rehearsal import rehearse
from clusterssl.plan.summary import Job, Plan, table
from clusterssl.submission import ROOT, find_script


@dataclass(frozen=True)
class Options:
    """Where it is to run."""

    nodes: int = 1
    """machines"""
    ngpus: int = 8
    """GPUs of each, and ranks on it; 0: one rank without a GPU"""
    num_images: int = 0
    """images of the dataset; 0: those of the script's --data_path are counted"""
    global_batch: int = 0
    """images of a step that are wanted; 0: what the script's flags make"""
    gpu_memory_gb: float = 0.0
    """of one GPU, in 10^9 bytes; more is refused. 0: unknown"""
    bandwidth_gbps: float = 100.0
    """of a node's network in 10^9 bits/s; on one node, of a GPU's link to the next"""
    latency_us: float = 20.0
    """from one node to another in microseconds"""
    local_latency_us: float = 2.0
    """from one GPU of a node to the next in microseconds"""
    results: str = str(ROOT / "bench" / "results")
    """folder of measured speeds"""

    def __post_init__(self) -> None:
        cfg.require_numbers(self, "nodes", "bandwidth_gbps", above=0)
        cfg.require_numbers(self, "ngpus", "num_images", "global_batch", "gpu_memory_gb", least=0)
        cfg.require_numbers(self, "latency_us", "local_latency_us", least=0)


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our flags, each with one value, wherever they stand; and the script, main_swav.py unless named, with its own."""
    if {"-h", "--help"} & set(argv[:1]):
        return list(argv[:1]), []
    known = {flag.name for flag in cfg.flags(Options())}
    ours, theirs, words = [], [], iter(argv)
    for word in words:
        if word.startswith("--") and word[2:].partition("=")[0].replace("-", "_") in known:
            ours += [word] if "=" in word else [word, *([value] if (value := next(words, None)) is not None else [])]
        else:
            theirs.append(word)
    theirs = theirs if theirs and theirs[0].endswith(".py") else ["main_swav.py", *theirs]
    elsewhere = cfg.gives(ours, "num_images") and not cfg.gives(theirs, "data_path")
    return ours, theirs + (["--data_path", "images"] if elsewhere else [])  # without one the settings are the digits'


def plan(options: Options, script: Path, words: Sequence[str]) -> Plan:
    """The plan of a training.

    Raises:
        UserError: what the training itself would refuse, or a global batch that these ranks cannot share.
    """
    per_node = max(options.ngpus, 1)
    blueprint = read_script(script, words, options.nodes, per_node)
    gpu = options.ngpus > 0 and blueprint.config.run.device != "cpu"
    network = Network(options.bandwidth_gbps, options.latency_us, per_node, options.local_latency_us)
    job = Job(options.nodes, per_node, gpu, network, options.gpu_memory_gb)
    _check_batch(options.global_batch, blueprint, job.ranks)
    data = blueprint.config.data
    images = options.num_images or len(open_source(data.data_path, subset_file=data.subset_file))
    rehearsed = rehearse(blueprint, images, job.ranks, gpu=gpu)
    return Plan(blueprint, job, rehearsed, fitting(blueprint, Path(options.results), ROOT, gpu=gpu))


def _check_batch(wanted: int, blueprint: Blueprint, ranks: int) -> None:
    optim = blueprint.config.optim
    made, parts = optim.batch_size * optim.accumulate * ranks, optim.accumulate * ranks
    if wanted in (0, made):
        return
    if wanted % parts:
        raise UserError(f"--global_batch {wanted}: cannot be divided among {ranks} ranks x {optim.accumulate}")
    raise UserError(f"--global_batch {wanted}: these flags make {made}; give --batch_size {wanted // parts}")


def main() -> None:
    ours, theirs = split(sys.argv[1:])
    options = cfg.parse(Options, ours, description=__doc__)
    found = plan(options, find_script(theirs[0]), theirs[1:])
    sys.stdout.write(table(list(found.rows())) + "\n")
    problems = found.problems()
    if problems:
        raise UserError("; ".join(problems))


if __name__ == "__main__":
    sys.argv[0] = "clusterssl.plan"
    cfg.entry(main)
