"""Crops of small images by loader workers, by the training process, and from the training device (--cache device).

    CLUSTERSSL_DATA=data python bench/resident.py
    python bench/resident.py --data_path /tiny-imagenet/train --side 64 --device cuda

Two crops an image, as large as the images. The loaders keep the decoded images in memory and have read them before
(--cache auto), so that nothing is decoded while time runs; making the workers counts, once for `batches` batches. On a
CPU `--cache device` cuts as the loaders do; "cut as on a GPU" is what it does elsewhere. The systems take turns;
medians count. Processor time is that of all processes.
"""

from __future__ import annotations

import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from record import options_of, write_result
from summary import Line, Summary, Table, between, count, number, often, quantity, times

from clusterssl import config as cfg
from clusterssl.data import Loader, MultiCrop, Source, open_source, reside
from clusterssl.errors import UserError
from clusterssl.pretrain import keep_freed_memory


@dataclass(frozen=True)
class Options:
    """Comparison."""

    data_path: str = ""
    """folder of images; without it CIFAR-10's first `images` of cifar10.tar.gz in $CLUSTERSSL_DATA, or "digits\""""
    side: int = 32
    """of the crops"""
    images: int = 10_000
    workers: tuple[int, ...] = (1, 2)
    batch_size: int = 256
    batches: int = 150
    """timed, of each repeat"""
    repeats: int = 5
    threads: int = 1
    """of the training process, for the crops it takes itself"""
    device: Literal["cpu", "cuda"] = "cpu"
    out: str = "runs/bench/resident.json"


@contextmanager
def folder_of(options: Options) -> Iterator[str]:
    """The folder named, or CIFAR-10's training images, unpacked."""
    if options.data_path:
        yield options.data_path
        return
    archive = Path(os.environ.get("CLUSTERSSL_DATA", "")) / "cifar10.tar.gz"
    if not archive.is_file():
        raise UserError("no images: name a folder with --data_path, or that of cifar10.tar.gz with CLUSTERSSL_DATA")
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        yield f"{folder}/train"


def loaders(source: Source, options: Options) -> dict[str, Loader]:
    """What is compared."""
    multicrop = MultiCrop((2,), (options.side,), (0.3,), (1.0,))
    device = torch.device(options.device)
    more: dict[str, dict[str, Any]] = {f"{count} workers": {"workers": count} for count in options.workers}
    more |= {"in the process": {}, "--cache device": {"resident": reside(source, device)}}
    if device.type == "cpu":
        more["cut as on a GPU"] = {"resident": reside(source, device)}
        more["cut as on a GPU"]["resident"].whole_batches = True
    batch = min(options.batch_size, len(source))
    return {
        name: Loader(
            source, multicrop, batch_size=batch, images_per_epoch=batch * options.batches, persistent=False,
            pin_memory=device.type == "cuda", **words,
        )
        for name, words in more.items()
    }  # fmt: skip


def measure(loader: Loader, device: str) -> tuple[float, float]:
    """Images a second, and milliseconds of processor time an image."""
    order = torch.arange(loader.sampler.images).remainder(loader.sampler.n).numpy()
    began, worked, images = time.perf_counter(), _processor_seconds(), 0
    for step in loader.epoch(0, order=order):
        for batch in step:
            moved = [crop.to(device, non_blocking=True) for crop in batch.crops]
            images += len(moved[0])
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    return images / seconds, 1e3 * (_processor_seconds() - worked) / images


def _processor_seconds() -> float:
    """Of this process and of those that have ended."""
    return sum(os.times()[:4])


def summary(result: dict[str, Any]) -> Summary:
    """The result in words."""
    options, found = result["options"], result["systems"]
    first = found["--cache device"]
    rows = []
    for name, one in found.items():
        low, high = (pick(one["all_images_per_s"]) for pick in (min, max))
        rows.append((name, number(one["images_per_s"]) + between(low, high),
                     times(one["images_per_s"] / first["images_per_s"]),
                     quantity(one["processor_ms_per_image"], "ms")))  # fmt: skip
    best = max((name for name in found if "worker" in name or "process" in name),
               key=lambda name: found[name]["images_per_s"])  # fmt: skip
    data = {"": "CIFAR-10", "digits": "digits"}.get(options["data_path"], "a folder of images")
    return Summary(
        "Does it pay to keep small images on the training device and cut the crops there?",
        f"--cache device; loader workers, the training process; {data}, {options['device']}",
        f"{data}, 2 crops of {options['side']} px, batches of {options['batch_size']}, {options['device']}, "
        f"{count(options['threads'], 'thread')}; {often(options['repeats'], 'least to most')}.",
        [Table(("", "images/s", "over --cache device", "processor time an image"), rows)],
        [Line(f"images/s of --cache device over the best loader's ({best})",
              times(first["images_per_s"] / found[best]["images_per_s"]))],
    )  # fmt: skip


def main() -> None:
    options = options_of(Options, __doc__)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    with folder_of(options) as folder:
        source = open_source(folder, limit=options.images)
        found = loaders(source, options)
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
        for turn in range(options.repeats):
            for name in found if turn % 2 else reversed(found):
                runs[name].append(measure(found[name], options.device))
    table = {}
    for name, all_of_it in runs.items():
        rate, cost = median(one[0] for one in all_of_it), median(one[1] for one in all_of_it)
        rates = [one[0] for one in all_of_it]
        table[name] = {"images_per_s": rate, "all_images_per_s": rates, "processor_ms_per_image": cost}
    write_result(Path(options.out), {"options": cfg.plain(options), "systems": table}, summary)


if __name__ == "__main__":
    cfg.entry(main)
