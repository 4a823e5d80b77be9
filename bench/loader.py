"""Batches of crops from real photographs, end to end: scaling with the workers, and what the main process pays.

    python bench/loader.py --workers 1 2
    python bench/loader.py --data_path /imagenet/train --workers 1 2 4 8 16 --batches 100

Every number of workers loads whole batches of 2 x 224 + 6 x 96 uint8 crops; the main process only takes them. It counts
from the second batch of each worker on, when all workers are busy. The processor time of the main process is told as a
share of one core.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from photos import folder_of_photos
from record import options_of, write_result
from summary import Bar, Line, Summary, Table, between, count, number, often, percent, quantity, times

from clusterssl import config as cfg
from clusterssl.data import Loader, MultiCrop, Source, open_source

BARS = {
    "scaling": Bar("images/s of a worker over those of one alone, as many workers as cores", 0.9),
    "main": Bar("main process's share of a core", 5, "%", most=True),
}


@dataclass(frozen=True)
class Options:
    """Comparison."""

    data_path: str = ""
    """folder of photographs, or packed ones; without it those of imagenet-sample.tar in $CLUSTERSSL_DATA"""
    workers: tuple[int, ...] = (1, 2)
    batch_size: int = 32
    batches: int = 12
    """timed, of each repeat"""
    repeats: int = 3
    out: str = "runs/bench/loader.json"


def measure(source: Source, workers: int, options: Options) -> tuple[float, float]:
    """Images a second, and the main process's processor time over the clock's."""
    multicrop = MultiCrop((2, 6), (224, 96), (0.14, 0.05), (1.0, 0.14))
    untimed = 2 * max(workers, 1)
    loader = Loader(
        source, multicrop, batch_size=options.batch_size, workers=workers, pin_memory=torch.cuda.is_available(),
        images_per_epoch=options.batch_size * (options.batches + untimed), persistent=False,
    )  # fmt: skip
    steps = loader.epoch(0, order=_order(len(source), options.batch_size * (options.batches + untimed)))
    for _ in range(untimed):
        next(steps)
    began, worked, images = time.perf_counter(), time.process_time(), 0
    for step in steps:
        images += sum(len(batch.index) for batch in step)
    seconds = time.perf_counter() - began
    return images / seconds, (time.process_time() - worked) / seconds


def _order(images: int, wanted: int):  # type: ignore[no-untyped-def]
    return torch.arange(wanted).remainder(images).numpy()


def summary(result: dict[str, Any]) -> Summary:
    """The result in words."""
    options, rows = result["options"], result["rows"]
    table = [
        (row["workers"],
         number(row["images_per_s"]) + between(*(pick(row["all_images_per_s"]) for pick in (min, max))),
         times(row["per_worker_over_first"]), percent(row["main_process_share"]),
         quantity(row["main_process_ms_per_image"], "ms"))
        for row in rows
    ]  # fmt: skip
    lines: list[Line] = []
    fitting = [row for row in rows if row["workers"] <= result["cores"]]
    if fitting:
        largest = max(fitting, key=lambda row: row["workers"])
        lines.append(BARS["scaling"].judge(largest["per_worker_over_first"], count(largest["workers"], "worker")))
    busiest = max(rows, key=lambda row: row["main_process_share"])
    lines.append(BARS["main"].judge(100 * busiest["main_process_share"], count(busiest["workers"], "worker")))
    return Summary(
        "Do more loader workers load as many times more, and what does the main process pay?",
        "ours with 1, 2 ... workers",
        f"Real photographs, batches of {options['batch_size']} x (2 x 224 + 6 x 96) crops, {result['cores']} cores; "
        f"{often(options['repeats'], 'least to most')}.",
        [Table(("workers", "images/s", "a worker over the first row's", "main process of a core", "an image"), table)],
        lines,
    )


def main() -> None:
    options = options_of(Options, __doc__)
    found: dict[int, list[tuple[float, float]]] = {workers: [] for workers in options.workers}
    with folder_of_photos(options.data_path) as folder:
        source = open_source(folder)
        for _ in range(options.repeats):
            for workers in options.workers:
                found[workers].append(measure(source, workers, options))
    first = options.workers[0]
    base = median(rate for rate, _ in found[first]) / max(first, 1)
    rows = []
    for workers, runs in found.items():
        rate, share = median(one[0] for one in runs), median(one[1] for one in runs)
        scaling = rate / (base * max(workers, 1))
        cost = 1e3 * share / rate
        rows.append({
            "workers": workers, "images_per_s": rate, "all_images_per_s": [one[0] for one in runs],
            "per_worker_over_first": scaling, "main_process_share": share, "main_process_ms_per_image": cost,
        })  # fmt: skip
    write_result(Path(options.out), {"options": cfg.plain(options), "cores": os.cpu_count(), "rows": rows}, summary)


if __name__ == "__main__":
    cfg.entry(main)
