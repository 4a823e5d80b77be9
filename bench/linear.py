"""Linear probe: on kept features beside through the network, one epoch of each and a whole run.

    python bench/linear.py
    python bench/linear.py --arch resnet50 --image_size 224 --images 512

Both train the same classifier on the same synthetic images with the same batches: through the network every epoch draws
random crops and computes their features (as published), on kept features they are computed once for all epochs and
read memory-mapped. A run of --epochs epochs counts that one pass. CPU time, that of all threads together, depends less
on what else the machine does.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from record import options_of, write_result
from summary import Bar, Summary, Table, count, duration, times

import eval_linear
from clusterssl import config as cfg
from clusterssl.evals import inputs
from clusterssl.evals.cache import CacheOptions
from clusterssl.evals.probing import ClassifierOptions, Probing
from clusterssl.evals.setup import Setup, open_setup
from clusterssl.evals.training import SgdOptions

BARS = {"run": Bar("a whole run through the network over one on kept features", 20)}


@dataclass(frozen=True)
class Options:
    """Comparison."""

    arch: str = "resnet18"
    image_size: int = 64
    images: int = 1000
    """of 64 x 64 pixels"""
    repeats: int = 3
    """epochs measured on kept features; through the network one is"""
    epochs: int = 100
    """of a whole run"""
    threads: int = 0
    """0: all cores"""
    out: str = "runs/bench/linear.json"


def setup_of(options: Options, folder: str) -> Setup:
    """A network of random weights on synthetic images."""
    network = inputs.NetworkOptions(arch=options.arch, image_size=options.image_size, stem="imagenet")
    data = inputs.DataOptions(data_path=f"synthetic:{options.images}:64x64:10", workers=0)
    config = eval_linear.Config(network=network, data=data, dump_path=folder, seed=1)
    return open_setup(config, network, CacheOptions(f"{folder}/features"))


def measure(setup: Setup, how: str, epochs: int) -> dict[str, float]:
    """CPU and clock seconds of the preparation and of the median epoch."""
    classifier = ClassifierOptions(train_augmentation=how)  # type: ignore[arg-type]
    probing = Probing(setup.reopened(), classifier, SgdOptions(batch_size=256))
    found: list[tuple[float, float]] = []
    for step in range(epochs + 1):
        cpu, clock = time.process_time(), time.perf_counter()
        if step:
            probing.epoch(step - 1)
        else:
            probing.prepare()
        found.append((time.process_time() - cpu, time.perf_counter() - clock))
    each_cpu, each_clock = (median(column) for column in zip(*found[1:], strict=True))
    return {"prepare_cpu_s": found[0][0], "epoch_cpu_s": each_cpu, "epoch_clock_s": each_clock}


def summary(result: dict[str, Any]) -> Summary:
    """The result in words."""
    options, runs = result["options"], result["run_cpu_s"]
    rows = [
        (name, duration(result[key]["prepare_cpu_s"], "s"), duration(result[key]["epoch_cpu_s"]),
         times(result[key]["epoch_cpu_s"] / result["kept"]["epoch_cpu_s"]), duration(runs[key], "s"),
         times(runs[key] / runs["kept"]))
        for name, key in (("on kept features", "kept"), ("through the network", "network"))
    ]  # fmt: skip
    whole = f"{options['epochs']} epochs"
    return Summary(
        "How much sooner does a linear probe end on kept features?",
        "kept features; through the network",
        f"{options['arch']}, {options['images']} images at {options['image_size']} px, "
        f"{count(result['threads'], 'thread')}; CPU time.",
        [Table(("", "preparation", "an epoch", "over kept", whole, "over kept"), rows)],
        [BARS["run"].judge(result["run_ratio"], whole)],
    )


def main() -> None:
    options = options_of(Options, __doc__)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    with tempfile.TemporaryDirectory() as folder:
        setup = setup_of(options, folder)
        kept = measure(setup, "none", options.repeats)
        network = measure(setup, "rrc", 1)
    runs = {
        name: found["prepare_cpu_s"] + options.epochs * found["epoch_cpu_s"]
        for name, found in (("kept", kept), ("network", network))
    }
    result: dict[str, Any] = {
        "options": cfg.plain(options), "threads": torch.get_num_threads(), "kept": kept, "network": network,
        "epoch_ratio": network["epoch_cpu_s"] / kept["epoch_cpu_s"], "run_cpu_s": runs,
        "run_ratio": runs["network"] / runs["kept"],
    }  # fmt: skip
    write_result(Path(options.out), result, summary)


if __name__ == "__main__":
    cfg.entry(main)
