"""Accuracy against wall-clock time: SwAV on CIFAR-10 by a recipe of scripts/, k-NN every few epochs, linear at the end.

    python bench/time_to_accuracy.py --data_path cifar10 --out bench/results/time_to_accuracy-mine.json   # one GPU
    python bench/time_to_accuracy.py --data_path cifar10.tar.gz --piece_minutes 8    # the same call, until it is done
    python bench/time_to_accuracy.py --data_path cifar10 --small --device cpu        # 2 cores, a few minutes

main_swav.py trains; time is that of its processes from start to end, what they need to start and to save included. A
piece ends with a signal after --piece_minutes, and the same command goes on with the next one; nothing is written to
--out before the schedule has ended or --minutes are over. Kept checkpoints are evaluated afterwards, out of that time:
k-NN (k = 20) each, the last by a linear probe, too. The published figure was not measured here.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from record import options_of, write_result
from summary import GPU, Bar, Line, Summary, Table, duration, number
from trained import ROOT, K, top1, unpacked

from clusterssl import config as cfg

SMALL = (
    "--arch conv4w8 --hidden_mlp 64 --feat_dim 32 --nmb_prototypes 30 --warmup_epochs 0 --batch_size 256 --epochs 2 "
    "--workers 0"
)
BARS = {"linear": Bar("linear accuracy within 15 minutes on one GPU, CIFAR-10, ResNet-18", 90, "%", needs=GPU)}
PUBLISHED = "89.17 % linear (online), ResNet-18, 1000 epochs: SwAV in solo-learn's README, time not stated"


@dataclass(frozen=True)
class Options:
    """Run."""

    data_path: str = "cifar10"
    """folder with train/ and val/ of CIFAR-10 images, or an archive of it"""
    recipe: str = "scripts/swav_cifar10.sh"
    epochs: int = 0
    """of the schedule; 0: the recipe's"""
    every: int = 10
    """epochs between two k-NN evaluations"""
    minutes: float = 15.0
    """of training, over all pieces"""
    piece_minutes: float = 0.0
    """of training in this call; 0: all there are"""
    linear_epochs: int = 100
    small: bool = False
    """a tiny network for two epochs, to see that everything works"""
    seed: int = 2001
    device: Literal["auto", "cpu", "cuda"] = "auto"
    folder: str = "runs/time_to_accuracy"
    """where the run is kept; the next call goes on there"""
    out: str = "runs/bench/time_to_accuracy.json"


def piece(options: Options, data: str, run: Path, seconds: float) -> bool:
    """Train for so long at most and note the times; whether the schedule has ended."""
    words = [*(SMALL.split() if options.small else []), "--checkpoint_freq", str(options.every)]
    words += ["--epochs", str(options.epochs)] if options.epochs else []
    words += ["--seed", str(options.seed), "--device", options.device, "--dump_path", str(run)]
    env = {**os.environ, "DATASET_PATH": f"{data}/train", "PYTHON": sys.executable}
    began = time.time()
    process = subprocess.Popen(["bash", str(ROOT / options.recipe), *words], env=env)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # the recipe has become the training by exec
        code = process.wait()
    with (run.parent / "pieces.jsonl").open("a") as file:
        file.write(json.dumps({"began": began, "ended": time.time(), "code": code}) + "\n")
    if code not in (0, 75, -signal.SIGTERM):
        raise SystemExit(f"{options.recipe} ended with {code}")
    return code == 0


def lines(path: Path) -> list[dict[str, Any]]:
    """Records of a file, none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def trained_until(moment: float, pieces: list[dict[str, Any]]) -> float:
    """Seconds of training up to a moment."""
    return sum(max(0.0, min(one["ended"], moment) - one["began"]) for one in pieces)


def curve(run: Path, pieces: list[dict[str, Any]], data: str, options: Options) -> list[dict[str, float]]:
    """k-NN of every kept checkpoint, with the time at which its epoch had been trained; known ones stay."""
    records = lines(run / "metrics.jsonl")
    at = {record["epoch_end"]: record["time"] for record in records if "epoch_end" in record}
    found = {point["epoch"]: point for point in lines(run.parent / "curve.jsonl")}
    for path in sorted((run / "checkpoints").glob("ckp-*.pth"), key=lambda path: int(path.stem[4:])):
        epoch = int(path.stem[4:])
        if epoch + 1 in found or epoch not in at:
            continue
        knn = top1("eval_knn", path, data, "--device", options.device, "--nb_knn", str(K))
        found[epoch + 1] = {"epoch": epoch + 1, "minutes": trained_until(at[epoch], pieces) / 60, "knn": knn}
        with (run.parent / "curve.jsonl").open("a") as file:
            file.write(json.dumps(found[epoch + 1]) + "\n")
    return [found[epoch] for epoch in sorted(found)]


def summary(result: dict[str, Any]) -> Summary:
    """The result in words."""
    options = result["options"]
    told = "the schedule ended" if result["schedule_ended"] else "stopped before the schedule's end"
    rows = [(point["epoch"], duration(60 * point["minutes"], "min"), f"{point['knn']:.2f} %")
            for point in result["curve"]]  # fmt: skip
    demanded = not options["small"] and result["flags"].get("arch") == "resnet18" and options["minutes"] <= 15
    end = f"{told} after {result['minutes']:.2f} min, {number(result['images_per_s'])} images/s"
    line = BARS["linear"].judge(result["linear"], end)
    return Summary(
        "How long does it take to reach an accuracy on CIFAR-10?",
        "ours by the clock; published figure",
        f"{options['recipe']}, {result['flags'].get('arch')}, k-NN with k = {result['k']}. Published: {PUBLISHED}",
        [Table(("epoch", "training so far", "k-NN"), rows)],
        [line if demanded else Line("linear accuracy", line.figure)],
    )


def main() -> None:
    options = options_of(Options, __doc__)
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    data, run = unpacked(options.data_path, folder / "images"), folder / "run"
    pieces = lines(folder / "pieces.jsonl")
    ended = bool(pieces) and pieces[-1]["code"] == 0
    left = 60 * options.minutes - trained_until(time.time(), pieces)
    if not ended and left > 0:
        ended = piece(options, data, run, min(left, 60 * options.piece_minutes or left))
        pieces = lines(folder / "pieces.jsonl")
    spent = trained_until(time.time(), pieces) / 60
    points = curve(run, pieces, data, options)
    for point in points:
        print(f"epoch {point['epoch']:4.0f}  {point['minutes']:7.2f} min  k-NN {point['knn']:6.2f} %")
    if not ended and spent < options.minutes:
        print(f"{spent:.1f} of {options.minutes:g} minutes trained; the same command goes on")
        return
    whole = run / "checkpoint.pth.tar"
    linear = top1("eval_linear", whole, data, "--device", options.device, "--epochs", str(options.linear_epochs))
    speeds = [record["images_per_s"] for record in lines(run / "metrics.jsonl") if "images_per_s" in record]
    record = json.loads((run / "run.json").read_text())
    result = {"options": cfg.plain(options), "flags": record["config"], "curve": points, "linear": linear,
              "minutes": spent, "images_per_s": median(speeds), "schedule_ended": ended, "k": K}  # fmt: skip
    write_result(Path(options.out), result, summary)


if __name__ == "__main__":
    cfg.entry(main)
