"""Memory and time of assign.py on many images: the whole command, its loader processes included.

    python bench/assign.py --images 100000 --out bench/results/assign-epyc2.json

Images are JPEGs of noise and shapes made here, one in a hundred a copy of another; the network is untrained with 2048
features, as many as ResNet-50's, on crops so small that reading takes minutes. What memory takes depends on neither.
"""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import numpy as np
import torch
from PIL import Image
from record import options_of, write_result
from summary import Line, Summary, Table, count, duration, quantity

from clusterssl import config as cfg
from clusterssl.models.build import build_model
from clusterssl.models.weights import published_state_dict

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Options:
    images: int = 100_000
    """how many"""
    k: int = 100
    """clusters of the second command, by k-means"""
    workers: int = 2
    """loader processes"""
    out: str = "runs/bench/assign.json"
    """file of the result"""


def make_images(folder: Path, number: int) -> None:
    """JPEGs of 48 x 48; image 100 i + 99 is image 100 i again, of another quality."""
    for i in range(number):
        rng = np.random.default_rng(i - 99 if i % 100 == 99 else i)
        coarse = rng.integers(0, 256, (6, 6, 3)).astype(np.uint8)
        inner = folder / f"{i // 1000:04}"
        inner.mkdir(exist_ok=True)
        packed = io.BytesIO()
        Image.fromarray(coarse).resize((48, 48)).save(packed, "JPEG", quality=70 if i % 100 == 99 else 90)
        (inner / f"{i:07}.jpg").write_bytes(packed.getvalue())


def make_network(path: Path) -> None:
    torch.manual_seed(0)
    model = build_model("conv4w256", "small", 0, 128, 300)
    torch.save({"state_dict": published_state_dict(model), "model": {"size_crops": [[8, 8]], **model.record()}}, path)


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in tasks.read_text().split():
            found += family(int(child))
    return found


def memory_mib(pid: int) -> tuple[float, float]:
    """Memory of a process and its descendants, each shared page counted once: all, and what belongs to no file."""
    whole = anonymous = 0
    for member in family(pid):
        try:
            lines = Path(f"/proc/{member}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines[1:]}
        whole, anonymous = whole + sizes["Pss"], anonymous + sizes["Pss_Anon"]
    return whole / 1024, anonymous / 1024


def watched(words: list[str]) -> dict[str, float]:
    """Peak memory, highest resident memory of one process, and time of a command."""
    began, whole, anonymous = time.monotonic(), 0.0, 0.0
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT)
    while process.poll() is None:
        try:
            now = memory_mib(process.pid)
        except OSError:  # it has just ended
            continue
        whole, anonymous = max(whole, now[0]), max(anonymous, now[1])
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(process.returncode)
    return {"peak_mib": round(whole, 1), "anonymous_mib": round(anonymous, 1), "seconds": time.monotonic() - began}


def summary(result: dict[str, Any]) -> Summary:
    """The result in words."""
    runs = {"labels of the heads": result["heads"], "k-means of kept features": result["k_means_of_kept_features"]}
    rows = [
        (name, duration(found["seconds"], "s"), quantity(found["peak_mib"], "MiB"),
         quantity(found["anonymous_mib"], "MiB"))
        for name, found in runs.items()
    ]  # fmt: skip
    copies = f"{result['copies_found']:,} of {result['copies_planted']:,}"
    return Summary(
        "What memory and time does assign.py need for many images, and does it find the copies?",
        f"the whole command, {result['images']:,} images",
        f"{result['images']:,} small JPEGs, {result['features']} features, {count(result['threads'], 'thread')}; "
        "memory of "
        "loader processes included, pages that processes share counted once.",
        [Table(("", "time", "memory at its peak", "peak without pages of files"), rows)],
        [Line("copies found", f"{copies}, in {count(result['groups'], 'group')}"),
         Line("memory at its peak", quantity(max(found["peak_mib"] for found in runs.values()), "MiB"))],
    )  # fmt: skip


def main() -> None:
    options = options_of(Options, __doc__)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "images").mkdir()
        make_images(folder / "images", options.images)
        make_network(folder / "network.pth")
        words = ["assign.py", "--pretrained", str(folder / "network.pth"), "--images", str(folder / "images"),
                 "--out", str(folder / "out"), "--workers", str(options.workers), "--device", "cpu"]  # fmt: skip
        first = watched(words)
        second = watched([*words, "--k", str(options.k), "--links"])
        about = json.loads((folder / "out" / "assign.json").read_text())
        with (folder / "out" / "duplicates.csv").open(newline="") as file:
            names = [(row["group"], int(Path(row["path"]).stem)) for row in csv.DictReader(file)]
    groups: dict[str, set[int]] = {}
    for group, number in names:
        groups.setdefault(group, set()).add(number)
    planted = sum({i, i + 99} in groups.values() for i in range(0, options.images - 99, 100))
    result = {
        "images": options.images, "features": 2048, "threads": torch.get_num_threads(), "heads": first,
        "k_means_of_kept_features": second, "clusters_used": about["clusters_used"],
        "copies_planted": len(range(0, options.images - 99, 100)), "copies_found": planted, "groups": len(groups),
    }  # fmt: skip
    write_result(Path(options.out), result, summary)


if __name__ == "__main__":
    cfg.entry(main)
