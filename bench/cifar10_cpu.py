"""CIFAR-10 on a CPU: our recipe beside lightly's SwAV with equal time, network and augmentation, over fresh seeds.

    python bench/cifar10_cpu.py --data_path cifar10 --out bench/results/cifar10_cpu-mine.json

The recipe scripts/swav_cifar10_cpu.sh runs first and its CPU time is measured, start-up included; lightly then trains
for the same CPU time, loader process included, its learning rate following the same warm-up and cosine over that time.
CPU time is taken because it does not depend on what else the machine does. Beside them: the same network untrained, raw
or with its BatchNorm statistics set on the training images (the better one counts), and raw pixels. All are evaluated
by the same scripts: k-NN (k = 20, temperature 0.1) and a linear probe on frozen features.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from record import options_of, write_result
from summary import Bar, Summary, Table, count, duration
from torch import nn
from trained import ROOT, K, better, top1, unpacked, untrained

from clusterssl import config as cfg
from clusterssl.data import eval_batches, open_source
from clusterssl.evals.baselines import Pixels
from clusterssl.evals.features import extract
from clusterssl.evals.knn import knn_accuracy
from clusterssl.models.build import build_model
from clusterssl.models.weights import published_state_dict, read_weights
from clusterssl.optim import warmup_cosine

SIZE = (32, 32)
BARS = {
    "untrained": Bar("k-NN above the untrained network", 8, "points"),
    "lightly": Bar("k-NN above lightly's at equal CPU time", 0, "points"),
}


@dataclass(frozen=True)
class Options:
    """Comparison."""

    data_path: str = "cifar10"
    """folder with train/ and val/ of CIFAR-10 images, or an archive of it"""
    seeds: tuple[int, ...] = (2001, 2002, 2003)
    """never used for tuning"""
    folder: str = "runs/bench_cifar10_cpu"
    """where the runs are kept; finished ones are used again"""
    recipe: str = "scripts/swav_cifar10_cpu.sh"
    out: str = "runs/bench/cifar10_cpu.json"


def run_recipe(options: Options, seed: int) -> tuple[Path, float]:
    """Run our recipe; returns the run directory and its CPU seconds."""
    folder = Path(options.folder) / f"ours-{seed}"
    command = ["bash", str(ROOT / options.recipe), "--seed", str(seed), "--dump_path", str(folder), "--report", "false"]
    env = {**os.environ, "DATASET_PATH": f"{options.data_path}/train", "PYTHON": sys.executable}
    if not (folder / "seconds").exists():
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        subprocess.run(command, check=True, env=env)
        after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic() - began
        (folder / "seconds").write_text(str(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime))
        print(f"{command[1]}: {wall:.0f} s of wall-clock time", flush=True)
    return folder, float((folder / "seconds").read_text())


def cpu_seconds() -> float:
    """CPU time of this process and of its loader processes, in seconds."""
    ticks = 0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def save(model: nn.Module, folder: Path, about: dict) -> Path:
    """A network as a file that the evaluation scripts read."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "network.pth"
    torch.save({"state_dict": published_state_dict(model), "model": about}, path)
    return path


def before_training(about: dict, options: Options, seed: int) -> list[Path]:
    """The network of a run before training: as initialised, and with BatchNorm set on a tenth of the images."""
    source = open_source(options.data_path, split="train")
    batches = partial(eval_batches, source, range(0, len(source), 10), image_size=SIZE, batch_size=500)
    return untrained(about, lambda: (batch.images for batch in batches()), Path(options.folder), seed)


def train_lightly(flags: dict, about: dict, options: Options, seed: int, seconds: float) -> tuple[Path, dict]:
    """lightly's SwAV around the same network for `seconds`; returns the file and how far it came."""
    from lightly.loss import SwaVLoss
    from lightly.models.modules import SwaVProjectionHead, SwaVPrototypes

    torch.manual_seed(seed)
    model = build_model(about["arch"], about["stem"], flags["hidden_mlp"], flags["feat_dim"], flags["nmb_prototypes"])
    width = int(model.backbone.feature_dim)  # type: ignore[arg-type]
    head = SwaVProjectionHead(width, flags["hidden_mlp"], flags["feat_dim"])
    prototypes = SwaVPrototypes(flags["feat_dim"], flags["nmb_prototypes"])
    criterion = SwaVLoss(flags["temperature"], flags["sinkhorn_iterations"], flags["epsilon"])
    network = nn.ModuleList([model.backbone, head, prototypes]).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), flags["base_lr"], weight_decay=flags["wd"])
    batches = lightly_batches(flags, options)
    began, images = cpu_seconds(), 0
    network.train()
    while (elapsed := cpu_seconds() - began) < seconds:
        views = [view.contiguous(memory_format=torch.channels_last) for view in next(batches)]
        rate = warmup_cosine(
            int(1000 * elapsed / seconds), steps_per_epoch=1000 // flags["epochs"], epochs=flags["epochs"],
            warmup_epochs=flags["warmup_epochs"], start=flags["start_warmup"], base=flags["base_lr"],
            final=flags["final_lr"],
        )  # fmt: skip
        for group in optimizer.param_groups:
            group["lr"] = rate
        prototypes.normalize()
        scores = [prototypes(nn.functional.normalize(head(model.backbone(view)), dim=1)) for view in views]
        loss = criterion(scores, [])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        images += len(views[0])
    path = save(model, Path(options.folder) / f"lightly-{seed}", about)
    return path, {"images_per_cpu_s": images / elapsed, "epochs": images / flags["num_images"], "loss": loss.item()}


def lightly_batches(flags: dict, options: Options) -> Iterator[list[torch.Tensor]]:
    """Endless batches of lightly's multi-crop with the recipe's strengths, one loader process beside the training."""
    from lightly.transforms import SwaVTransform
    from torchvision.datasets import ImageFolder

    s = flags["color_jitter"]
    transform = SwaVTransform(
        crop_sizes=(32, 32), crop_counts=(2, 0), crop_min_scales=(flags["min_scale_crops"][0], 1),
        crop_max_scales=(flags["max_scale_crops"][0], 1), hf_prob=flags["flip_p"], cj_prob=flags["color_jitter_p"],
        cj_strength=1.0, cj_bright=s, cj_contrast=s, cj_sat=s, cj_hue=s / 4, random_gray_scale=flags["gray_p"],
        gaussian_blur=flags["blur_p"],
    )  # fmt: skip
    data = ImageFolder(f"{options.data_path}/train", transform)
    loader = torch.utils.data.DataLoader(
        data, flags["batch_size"], shuffle=True, drop_last=True, num_workers=1, persistent_workers=True
    )
    while True:
        for views, _ in loader:
            yield views


def scores(path: Path, options: Options, epochs: int = 10) -> dict[str, float]:
    """k-NN and linear accuracy by our evaluation scripts."""
    common = ("--device", "cpu", "--workers", "0")
    knn = top1("eval_knn", path, options.data_path, *common, "--nb_knn", str(K))
    linear = top1("eval_linear", path, options.data_path, *common, "--epochs", str(epochs))
    return {"eval_knn": knn, "eval_linear": linear}


def pixels(options: Options) -> float:
    """k-NN accuracy of raw pixels."""
    train, val = (extract(Pixels(), open_source(options.data_path, split=s), image_size=SIZE) for s in ("train", "val"))
    return knn_accuracy(*train, *val, ks=(K,))[K][0]


def summary(result: dict[str, Any]) -> Summary:
    """The result in words."""
    knn, linear, seeds = result["mean_knn"], result["mean_linear"], result["seeds"]
    rows = [("raw pixels", f"{result['pixels_knn']:.1f} %", "", "", "")]
    for name in knn:
        seconds = [one["cpu_seconds"] for one in seeds[name] if "cpu_seconds" in one]
        rows.append((name, f"{knn[name]:.1f} %", f"{linear[name]:.1f} %",
                     duration(mean(seconds), "s") if seconds else "", str(len(seeds[name]))))  # fmt: skip
    told = count(len(seeds["ours"]), "seed")
    return Summary(
        "What does the CPU recipe learn on CIFAR-10, beside lightly in the same time?",
        "ours; lightly's SwAV, untrained network, raw pixels",
        f"{result['recipe']}; k-NN (k = {result['k']}) and a linear probe on test images, mean of {told}.",
        [Table(("", "k-NN", "linear", "CPU time", "seeds"), rows)],
        [BARS[name].judge(knn["ours"] - knn[name], told) for name in BARS],
    )


def main() -> None:
    options = options_of(Options, __doc__)
    options = replace(options, data_path=unpacked(options.data_path, Path(options.folder) / "images"))
    rows: dict[str, list[dict]] = {"untrained": [], "lightly": [], "ours": []}
    for seed in options.seeds:
        folder, seconds = run_recipe(options, seed)
        record = json.loads((folder / "run.json").read_text())
        flags = {**record["config"], **record["facts"]}
        about = read_weights(str(folder / "checkpoint.pth.tar"))[1]
        before = [scores(path, options) for path in before_training(about, options, seed)]
        rows["untrained"].append(better(before))
        path, came = train_lightly(flags, about, options, seed, seconds)
        rows["lightly"].append({**scores(path, options), **came, "cpu_seconds": seconds})
        rows["ours"].append(
            {**scores(folder / "checkpoint.pth.tar", options), "epochs": flags["epochs"], "cpu_seconds": seconds}
        )
        for name, found in rows.items():
            print(seed, name, {key: round(value, 2) for key, value in found[-1].items()}, flush=True)
        report(options, rows)


def report(options: Options, rows: dict[str, list[dict]]) -> None:
    """Print the means so far and write them down."""
    knn = {name: mean(one["eval_knn"] for one in found) for name, found in rows.items()}
    linear = {name: mean(one["eval_linear"] for one in found) for name, found in rows.items()}
    raw = pixels(options)
    means = {"pixels_knn": raw, "mean_knn": knn, "mean_linear": linear}
    write_result(Path(options.out), {"recipe": options.recipe, "k": K, **means, "seeds": dict(rows)}, summary)


if __name__ == "__main__":
    cfg.entry(main)
