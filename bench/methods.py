"""Six methods on small images: one backbone, the same images seen, the same evaluations; and what each costs.

    python bench/methods.py --data_path cifar10 --out bench/results/methods_cifar10-mine.json
    python bench/methods.py --data_path digits --out bench/results/methods_digits-mine.json

On CIFAR-10 every method trains on the first 1,000 images of each class until it has seen the same number of crops, with
settings of its own but the same network, crop size and batch: those that see one crop of an image have twice the epochs
of those that compare two. On the digits each runs as it does without any flag. Then, on the test
images: k-NN (k = 20) against the training images, a linear probe on frozen features, and the agreement (NMI, ARI) of
the clusters that the method itself predicts with the classes. Crops a second are those of one core: CPU time counts,
from start to end, also that of passes that only assign; memory is the process's peak. "Untrained" is, by each measure,
the better of the network as initialised and with its BatchNorm statistics set on the training images.
"""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from record import options_of, write_result
from summary import Line, Summary, Table, count, duration, number, quantity
from trained import ROOT, accuracies, better, run_with_costs, untrained

from clusterssl import config as cfg
from clusterssl.data import eval_batches, open_source
from clusterssl.evals.clustering import agreement
from clusterssl.files import read_checkpoint
from clusterssl.models.weights import model_from_weights

SIZE = (32, 32)
NETWORK = {"arch": "conv4", "stem": "small", "size_crops": [list(SIZE)], "hidden_mlp": 256, "feat_dim": 64}
NETWORK["nmb_prototypes"] = 100
COMMON = "--arch conv4 --size_crops 32 --optimizer adamw --batch_size 256 --workers 0 --device cpu"
VIEWS = "--nmb_crops 2 --min_scale_crops 0.4 --max_scale_crops 1 --color_jitter 0.3 --blur_p 0"
HEAD = "--hidden_mlp 256 --feat_dim 64 --warmup_epochs 1 --base_lr 3e-3 --start_warmup 0 --final_lr 0"
COLOURS = "--min_scale_crops 0.4 --color_jitter 0.3 --color_jitter_p 0.8 --gray_p 0.2"
ONE_CROP = {"DeepCluster", "SeLa"}
METHODS: dict[str, tuple[str, str]] = {
    "SwAV": ("main_swav.py", f"{VIEWS} {HEAD} --nmb_prototypes 100 --epsilon 0.03 --freeze_prototypes_niters 0"),
    "DeepCluster-v2": ("main_deepclusterv2.py", f"{VIEWS} {HEAD} --nmb_prototypes 100 100 100"),
    "SeLa-v2": ("main_sela.py", f"{VIEWS} {HEAD} --nmb_prototypes 100 100 100 --freeze_prototypes_niters 0"),
    "DeepCluster": ("main_deepcluster.py", f"{COLOURS} --nmb_cluster 100 --pca_dim 64 --optimizer sgd --base_lr 0.2"),
    "SeLa": (
        "main_sela.py",
        f"--version 1 {COLOURS} --hue_jitter 0.1 --ncl 100 --hc 3 --nopts 20 --schedule cosine --base_lr 3e-3",
    ),
    "Self-Classifier": (
        "main_selfclassifier.py",
        f"{VIEWS} {HEAD} --solarize_p 0 --cls_size 50 100 200 --queue_len 8192",
    ),
}
"""name -> script and its flags besides those that all share"""


@dataclass(frozen=True)
class Options:
    """Comparison."""

    data_path: str = "cifar10"
    """folder with train/ and val/ of CIFAR-10 images, or digits"""
    methods: tuple[str, ...] = tuple(METHODS)
    epochs: int = 10
    """on CIFAR-10, of methods that compare two crops"""
    seeds: tuple[int, ...] = (3001, 3002, 3003)
    """never used for tuning"""
    per_class: int = 1000
    """training images of each class"""
    folder: str = "runs/bench_methods"
    """where the runs are kept; finished ones are used again"""
    out: str = "runs/bench/methods.json"


def data_of(options: Options) -> str:
    """The digits, or a folder of links to the training images in use and to all test images."""
    if options.data_path == "digits":
        return "digits"
    folder, whole = Path(options.folder) / "data", Path(options.data_path).absolute()
    for kind in sorted(path for path in (whole / "train").iterdir() if path.is_dir()):
        place = folder / "train" / kind.name
        if not place.exists():
            place.mkdir(parents=True)
            for image in sorted(kind.iterdir())[: options.per_class]:
                (place / image.name).symlink_to(image)
    if not (folder / "val").exists():
        (folder / "val").symlink_to(whole / "val")
    return str(folder)


def test_split(options: Options) -> str:
    """Name of the images that are scored."""
    return "test" if options.data_path == "digits" else "val"


def words_of(name: str, seed: int, options: Options) -> list[str]:
    """Command line of one training."""
    script, flags = METHODS[name]
    words = [script, "--seed", str(seed), "--report", "false"]
    words += ["--dump_path", str(Path(options.folder) / f"{name}-{seed}")]
    if options.data_path == "digits":
        return [*words, *(["--version", "1"] if name == "SeLa" else [])]
    words += ["--data_path", f"{data_of(options)}/train", "--epochs", str(options.epochs * (1 + (name in ONE_CROP)))]
    return [*words, *COMMON.split(), *flags.split()]


def train(name: str, seed: int, options: Options) -> tuple[Path, dict[str, float]]:
    """Run a method; returns its checkpoint, crops per second, CPU time and peak memory in MiB."""
    folder = Path(options.folder) / f"{name}-{seed}"
    script, *words = words_of(name, seed, options)
    found = run_with_costs([sys.executable, str(ROOT / script), *words], folder)
    run = json.loads((folder / "run.json").read_text())
    steps = read_checkpoint(folder / "checkpoint.pth.tar")["step"]
    crops = steps * run["facts"]["global_batch"] * sum(run["config"]["nmb_crops"])
    return folder / "checkpoint.pth.tar", {"crops_per_s": crops / found["cpu_seconds"], **found}


def before_training(seed: int, options: Options) -> list[Path]:
    """The network as initialised, and with calibrated BatchNorm."""
    source = open_source(data_of(options), split="train")
    batches = partial(eval_batches, source, image_size=SIZE, batch_size=500)
    return untrained(NETWORK, lambda: (batch.images for batch in batches()), Path(options.folder), seed)


def scores(path: Path, options: Options) -> dict[str, float]:
    """k-NN and linear accuracy in percent."""
    return accuracies(path, data_of(options), test_split(options))


@torch.no_grad()
def clusters(path: Path, options: Options) -> dict[str, float]:
    """NMI and ARI of the clusters that the network itself predicts for the test images, in percent."""
    model, source = model_from_weights(str(path)).eval(), open_source(data_of(options), split=test_split(options))
    batches = eval_batches(source, image_size=SIZE, resize=SIZE[0], batch_size=500)
    scores = agreement(torch.cat([model.predict(batch.images) for batch in batches]), source.labels)
    return {"nmi": scores["nmi"], "ari": scores["ari"]}


def summary(result: dict[str, Any]) -> Summary:
    """The result in words."""
    means, seeds = result["means"], result["seeds"]
    shown = [(key, lambda value: f"{value:.1f} %") for key in ("knn", "linear", "nmi", "ari")]
    shown += [("crops_per_s", number), ("memory_mib", lambda value: quantity(value, "MiB")),
              ("cpu_seconds", lambda value: duration(value, "s"))]  # fmt: skip
    rows = [(name, *(tell(found[key]) if key in found else "" for key, tell in shown), len(seeds[name]))
            for name, found in means.items()]  # fmt: skip
    trained = [name for name in means if name != "Untrained"]
    best = max(trained, key=lambda name: means[name]["linear"])
    number_of_seeds = count(min(len(seeds[name]) for name in trained), "seed")
    data = "digits" if "--data_path" not in next(iter(result["commands"].values())) else "CIFAR-10"
    data_given = " from the same number of crops" if data == "CIFAR-10" else " without any flag"
    gains = [means[name]["linear"] - means["Untrained"]["linear"] for name in trained]
    return Summary(
        f"What do the methods learn on {data}{data_given}, and what does each cost?",
        f"{len(trained)} methods, untrained network; {data}",
        f"Accuracies, NMI and ARI on test images, means over the seeds; crops/s of one core. First seed's command of "
        f"{best}: `{result['commands'][best]}`",
        [Table(("method", "k-NN", "linear", "NMI", "ARI", "crops/s", "memory", "CPU time", "seeds"), rows)],
        [Line("linear accuracy above the untrained network's",
              f"{_points(min(gains))} to {_points(max(gains))} points ({number_of_seeds})")],
    )  # fmt: skip


def _points(gain: float) -> str:
    return f"{round(gain, 1) + 0.0:+.1f}"


def main() -> None:
    options = options_of(Options, __doc__)
    unknown = set(options.methods) - set(METHODS)
    cfg.require(not unknown, f"--methods {' '.join(sorted(unknown))}: unknown; there are {', '.join(METHODS)}")
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in ("Untrained", *options.methods)}
    for seed in options.seeds:
        before = [scores(path, options) for path in before_training(seed, options)]
        rows["Untrained"].append(better(before))
        for name in options.methods:
            path, costs = train(name, seed, options)
            rows[name].append({**scores(path, options), **clusters(path, options), **costs})
            print(seed, name, {key: round(value, 2) for key, value in rows[name][-1].items()}, flush=True)
        report(options, rows)


def report(options: Options, rows: dict[str, list[dict[str, float]]]) -> None:
    """Write the means down with the single seeds, and print them."""
    means = {name: {key: mean(one[key] for one in found) for key in found[0]} for name, found in rows.items() if found}
    commands = {name: shlex.join(["python", *words_of(name, options.seeds[0], options)]) for name in options.methods}
    runs = {
        f"{name}-{seed}": Path(options.folder) / f"{name}-{seed}" / "run.json"
        for name in options.methods
        for seed in options.seeds
    }
    commits = {name: json.loads(path.read_text())["git"]["sha"] for name, path in runs.items() if path.exists()}
    about = {"commands": commands, "commits_of_runs": commits}
    write_result(Path(options.out), {**about, "means": means, "seeds": rows}, summary)


if __name__ == "__main__":
    cfg.entry(main)
