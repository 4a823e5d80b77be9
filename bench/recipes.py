"""The recipes of docs/RECIPES.md that a CPU can train, beside the same network untrained and trained on the labels.

    python bench/recipes.py --preset digits --out bench/results/recipes_digits-mine.json
    python bench/recipes.py --preset images64_cpu --data_path tiny-imagenet-16 --out recipes.json

A preset is the commands as the page quotes them; only places and seeds are others here, and no report is written.
"Supervised" is the same network trained on the true labels by train_on_labels.py with random crops and flips, with the
optimiser and the number of crops, so about the CPU time, of the recipe. All three are scored alike, by k-NN (k = 20)
and by a linear probe on frozen features, on images that nothing was trained on; of the untrained network, as
initialised or with BatchNorm statistics of the training images, the better score counts. Times are from start to end
of the command.
"""

from __future__ import annotations

import csv
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from record import options_of, write_result
from summary import Line, Summary, Table, between, count, duration, quantity
from trained import ROOT, accuracies, better, run_with_costs, untrained

from clusterssl import config as cfg
from clusterssl.data import eval_batches, open_source
from clusterssl.models.weights import read_weights


@dataclass(frozen=True)
class Preset:
    """Commands as the page quotes them, and how their networks are scored."""

    ours: str
    supervised: str
    data: str
    """how the commands call the folder of train/ and val/; digits: built in"""
    split: str = "val"
    """images that are scored"""
    linear_epochs: int = 20


_CPU = "--optimizer adamw --base_lr 3e-3 --warmup_epochs 1"
_LABELS = "python train_on_labels.py --labels labels.csv"
_HERE = "--workers 0 --device cpu"
PRESETS = {
    "digits": Preset(
        "python main_swav.py --dump_path runs/digits",
        f"{_LABELS} --augs 2 --epochs 120 --dump_path runs/digits_supervised",
        "digits", split="test",
    ),
    "cifar10_cpu": Preset(
        "DATASET_PATH=cifar10/train bash scripts/swav_cifar10_cpu.sh --dump_path runs/cifar10_cpu",
        f"{_LABELS} --data_path cifar10/train --dump_path runs/cifar10_supervised --arch conv4 --size_crops 32 "
        f"--min_scale_crops 0.4 --augs 2 {_CPU} --schedule cosine --epochs 12 --batch_size 256 {_HERE}",
        "cifar10", linear_epochs=10,
    ),
    "images64_cpu": Preset(
        "python main_swav.py --data_path images/train --dump_path runs/images64_cpu --arch conv4 --nmb_crops 2 "
        "--size_crops 48 --min_scale_crops 0.3 --max_scale_crops 1 --color_jitter 0.4 --blur_p 0 --hidden_mlp 256 "
        "--feat_dim 64 --nmb_prototypes 100 --epsilon 0.03 --freeze_prototypes_niters 0 "
        f"{_CPU} --epochs 10 --batch_size 128 {_HERE}",
        f"{_LABELS} --data_path images/train --dump_path runs/images64_supervised --arch conv4 --size_crops 48 "
        f"--min_scale_crops 0.3 --augs 2 {_CPU} --schedule cosine --epochs 20 --batch_size 128 {_HERE}",
        "images",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """One preset."""

    preset: str = "digits"
    data_path: str = "digits"
    """folder with train/ and val/, each of a folder for every class; or digits"""
    seeds: tuple[int, ...] = (4001,)
    """never used for tuning"""
    networks: tuple[str, ...] = ("ours", "untrained", "supervised")
    """what to train and score"""
    folder: str = "runs/bench_recipes"
    """where the runs are kept; finished ones are used again"""
    out: str = "runs/bench/recipes.json"

    def __post_init__(self) -> None:
        cfg.require(self.preset in PRESETS, f"--preset {self.preset}: unknown; there are {', '.join(PRESETS)}")
        unknown = set(self.networks) - {"ours", "untrained", "supervised"}
        cfg.require(not unknown, f"--networks {' '.join(sorted(unknown))}: use ours, untrained, supervised")
        alone = "untrained" in self.networks and "ours" not in self.networks
        cfg.require(not alone, "--networks untrained: needs ours, whose network it is before training")
        builtin = (PRESETS[self.preset].data == "digits") == (self.data_path == "digits")
        cfg.require(builtin, f"--preset {self.preset} --data_path {self.data_path}: digits go with digits only")


def words_of(name: str, seed: int, options: Options) -> tuple[dict[str, str], list[str]]:
    """Variables and words of a quoted command with places and seed of this machine; the last of equal flags counts."""
    preset = PRESETS[options.preset]
    folder = run_folder(name, seed, options)
    line = [word.replace(f"{preset.data}/train", f"{options.data_path}/train")
            for word in shlex.split(getattr(preset, name))]  # fmt: skip
    env = dict(word.split("=", 1) for word in line if word.split("=")[0].isupper() and "=" in word)
    words = [str(labels_file(options)) if word == "labels.csv" else word for word in line[len(env) :]]
    return env, [*words, "--report", "false", "--seed", str(seed), "--dump_path", str(folder)]


def run_folder(name: str, seed: int, options: Options) -> Path:
    """Run directory."""
    return Path(options.folder) / f"{options.preset}-{name}-{seed}"


def labels_file(options: Options) -> Path:
    """The true labels of the training images as train_on_labels.py reads them."""
    path = Path(options.folder) / f"{options.preset}-labels.csv"
    if not path.exists():
        source = open_source(options.data_path, split="train")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(("path", "head0"))
            rows.writerows((source.name(i), int(label)) for i, label in enumerate(source.labels))
    return path


def train(name: str, seed: int, options: Options) -> tuple[Path, dict[str, float]]:
    """Run a command; returns its checkpoint and what it cost."""
    env, (program, script, *words) = words_of(name, seed, options)
    program = sys.executable if program == "python" else program
    folder = run_folder(name, seed, options)
    costs = run_with_costs([program, str(ROOT / script), *words], folder, {**env, "PYTHON": sys.executable})
    return folder / "checkpoint.pth.tar", costs


def scores(path: Path, options: Options) -> dict[str, float]:
    """k-NN and linear accuracy in percent."""
    preset = PRESETS[options.preset]
    linear = ("--epochs", str(preset.linear_epochs), "--train_augmentation", "none")
    return accuracies(path, options.data_path, preset.split, linear)


def before_training(trained: Path, seed: int, options: Options) -> dict[str, float]:
    """The better accuracies of the untrained networks; BatchNorm is set on 5,000 training images at most."""
    about = read_weights(str(trained))[1]
    source = open_source(options.data_path, split="train")
    some = range(0, len(source), -(-len(source) // 5000))
    size = tuple(about["size_crops"][0])

    def images() -> Any:
        return (batch.images for batch in eval_batches(source, some, image_size=size, batch_size=500))

    folder = Path(options.folder) / options.preset
    return better([scores(path, options) for path in untrained(about, images, folder, seed)])


def measure(seed: int, options: Options) -> dict[str, dict[str, Any]]:
    """Accuracies and costs of the networks of one seed."""
    found: dict[str, dict[str, Any]] = {}
    for name in ("ours", "supervised"):
        if name in options.networks:
            path, costs = train(name, seed, options)
            sha = json.loads((path.parent / "run.json").read_text())["git"]["sha"]
            found[name] = {**scores(path, options), **costs, "commit": sha}
        if name == "ours" and "untrained" in options.networks:
            found["untrained"] = before_training(path, seed, options)
    return found


def report(options: Options, seeds: dict[int, dict[str, dict[str, Any]]]) -> None:
    """Write the means down with the single seeds, and print them."""
    means: dict[str, dict[str, float]] = {}
    for name in options.networks:
        rows = [found[name] for found in seeds.values()]
        means[name] = {key: mean(row[key] for row in rows) for key in rows[0] if key != "commit"}
    preset = PRESETS[options.preset]
    source = [len(open_source(options.data_path, split=split)) for split in ("train", preset.split)]
    about = {
        "preset": options.preset,
        "commands": {name: getattr(preset, name) for name in options.networks if name != "untrained"},
        "images": dict(zip(("train", "held_back"), source, strict=True)),
        "linear_epochs": preset.linear_epochs,
    }
    write_result(Path(options.out), {**about, "means": means, "seeds": seeds}, summary)


def summary(result: dict[str, Any]) -> Summary:
    """The result in words."""
    means, seeds = result["means"], list(result["seeds"].values())
    rows = []
    for name, row in means.items():
        single = [found[name] for found in seeds]
        cells = [f"{row[key]:.1f} %" + between(*(pick(x[key] for x in single) for pick in (min, max)), "{:.1f}".format)
                 for key in ("knn", "linear")]  # fmt: skip
        trained = "cpu_seconds" in row
        costs = (duration(row["cpu_seconds"], "s"), quantity(row["memory_mib"], "MiB")) if trained else ("", "")
        rows.append((name, *cells, *costs, len(single)))
    images, told = result["images"], count(len(seeds), "seed")
    others = [name for name in ("untrained", "supervised") if name in means and "ours" in means]
    return Summary(
        f"What does the recipe {result['preset']} learn, beside the same network untrained and trained on labels?",
        f"{', '.join(means)}; recipe {result['preset']}",
        f"{images['train']:,} training images, {images['held_back']:,} held back; k-NN (k = 20) and a linear probe, "
        f"mean of {told}{' (least to most)' * (len(seeds) > 1)}.",
        [Table(("network", "k-NN", "linear", "CPU time", "memory", "seeds"), rows)],
        [Line(f"ours above {name}, linear", f"{means['ours']['linear'] - means[name]['linear']:+.1f} points ({told})")
         for name in others]
        or [Line(f"{name}, linear", f"{row['linear']:.1f} % ({told})") for name, row in means.items()],
    )  # fmt: skip


def main() -> None:
    options = options_of(Options, __doc__)
    seeds: dict[int, dict[str, dict[str, Any]]] = {}
    for seed in options.seeds:
        seeds[seed] = measure(seed, options)
        print(seed, json.dumps(seeds[seed]), flush=True)
        report(options, seeds)


if __name__ == "__main__":
    cfg.entry(main)
