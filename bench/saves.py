"""How long a checkpoint holds up training: written while it waits, and behind its back, in turns in one process.

    python bench/saves.py                                    # ResNet-50, its momenta, a memory bank of 100,000 images
    python bench/saves.py --folder /runs/scratch             # on the disk that runs use
    python bench/saves.py --device cuda --batch 64 --side 224

Training is real: steps of ResNet-50 with SwAV's heads, LARS and a few images. A window of steps has no save, one that
training waits for, or one in the background, begun after its first step; the windows take turns. What a save costs is
the time of its window less the median of those without, so that it counts that the writer takes processor time from
the steps; the time of the call alone stands beside it. Its share is that of --checkpoint_minutes.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from record import options_of, write_result
from summary import MEGABYTES, Bar, Summary, Table, duration, often, percent, quantity, times

from clusterssl import checkpoint
from clusterssl import config as cfg
from clusterssl.cluster.memory import MemoryBank
from clusterssl.dist import World
from clusterssl.models.build import build_model
from clusterssl.optim import build_optimizer
from clusterssl.run import Run

EPOCH_S = 220.0
"""of the published 800 epochs on 64 GPUs, each of which ends with a checkpoint"""
MODES = ("no save", "waited for", "in the background")
BARS = {"epoch": Bar("share of an epoch of 220 s that a save in the background takes", 2, "%", most=True)}


@dataclass(frozen=True)
class Options:
    """Measurement."""

    rows: int = 100_000
    """images of this rank in the memory bank: 2 crops x 128 floats each"""
    batch: int = 2
    side: int = 64
    """pixels of a crop"""
    steps: int = 24
    """of a window; must outlast a save in the background"""
    repeats: int = 7
    checkpoint_minutes: float = 10.0
    threads: int = 0
    """0: all cores"""
    device: Literal["cpu", "cuda"] = "cpu"
    folder: str = ""
    """where to write; a folder for temporary files without it"""
    out: str = "runs/bench/saves.json"


class Training:
    """Steps of a real network, and checkpoints of its state."""

    def __init__(self, options: Options, folder: Path) -> None:
        self.options, device = options, torch.device(options.device)
        self.model = build_model("resnet50", "imagenet", 2048, 128, 3000).to(device)
        self.optimizer = build_optimizer(self.model.parameters(), "lars", 0.1, 1e-6, momentum=0.9, clip_grad=0.0)
        self.bank = MemoryBank(2, options.rows // options.batch, options.batch, 128, device)
        self.images = torch.randn(options.batch, 3, options.side, options.side, device=device)
        self.run, self.done = Run(folder, World(device=device)), 0

    def step(self) -> None:
        """One optimiser step, to its end on the device."""
        _, scores_NK = self.model([self.images])
        scores_NK.square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        if self.options.device == "cuda":
            torch.cuda.synchronize()

    def window(self, mode: str) -> dict[str, float]:
        """Seconds of a window of steps, of the call that saves, and of the save."""
        began, call = time.perf_counter(), 0.0
        for number in range(self.options.steps):
            self.step()
            if number == 0 and mode != "no save":
                at = time.perf_counter()
                wait, model = mode == "waited for", self.model
                checkpoint.save(self.run, model, self.optimizer, self.bank, {}, self.done, wait=wait)
                call = time.perf_counter() - at
        seconds = time.perf_counter() - began
        outlasted = self.run.saver.busy
        self.run.saver.finish()
        if outlasted:
            print("the save outlasted its window: give more --steps", flush=True)
        return {"window": seconds, "call": call, "save": self.run.saver.seconds, "outlasted": outlasted}


def measure(training: Training, options: Options) -> dict[str, list[dict[str, float]]]:
    """All windows of each mode, after one of each that warms up."""
    found: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
    for repeat in range(options.repeats + 1):
        for mode in MODES:
            one = training.window(mode)
            if repeat:
                found[mode].append(one)
                print(f"{repeat}/{options.repeats} {mode:18} window {one['window']:.2f} s, call {one['call']:.3f} s")
    return found


def summary(result: dict[str, Any]) -> Summary:
    """The result in words."""
    options, modes = result["options"], result["modes"]
    ours = modes["in the background"]
    rows = [
        (mode, duration(one["stall_s"]), times(one["stall_s"] / ours["stall_s"]), duration(one["call_s"]),
         duration(one["save_s"]), percent(one["share_of_checkpoint_minutes"]), percent(one["share_of_epoch"]))
        for mode, one in modes.items()
    ]  # fmt: skip
    head = ("", "training loses", "over the background's", "of that the call", "the save takes",
            f"share of {options['checkpoint_minutes']:g} min", f"share of {EPOCH_S:.0f} s")  # fmt: skip
    return Summary(
        "How long does a checkpoint hold up training?",
        "saves in the background; saves that are waited for",
        f"ResNet-50 with its momenta and a memory bank of {options['rows']:,} images: "
        f"{quantity(options['megabytes'] * MEGABYTES, 'MiB')}; steps of {duration(options['step_s'])}, "
        f"{options['device']}; {often(options['repeats'], '')}, windows of {options['steps']} steps less those without "
        "a save.",
        [Table(head, rows)],
        [BARS["epoch"].judge(100 * ours["share_of_epoch"])],
    )


def main() -> None:
    options = options_of(Options, __doc__)
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(dir=options.folder or None) as name:
        training = Training(options, Path(name))
        found = measure(training, options)
        megabytes = sum(path.stat().st_size for path in Path(name).glob("checkpoint*")) / 2e6
    base = median(one["window"] for one in found["no save"])
    table = {}
    for mode in MODES[1:]:
        stall = median(one["window"] for one in found[mode]) - base
        table[mode] = {
            "stall_s": stall, "call_s": median(one["call"] for one in found[mode]),
            "save_s": median(one["save"] for one in found[mode]),
            "share_of_checkpoint_minutes": stall / (60 * options.checkpoint_minutes), "share_of_epoch": stall / EPOCH_S,
        }  # fmt: skip
    about = {
        **cfg.plain(options),
        "threads": torch.get_num_threads(),
        "megabytes": megabytes,
        "step_s": base / options.steps,
    }
    write_result(Path(options.out), {"options": about, "modes": table, "windows": found}, summary)


if __name__ == "__main__":
    cfg.entry(main)
