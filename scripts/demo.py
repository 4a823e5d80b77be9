"""Pretrain SwAV on the built-in digits with fresh seeds, show what that is worth, write the report page.

    python scripts/demo.py
    python scripts/demo.py --seeds 1 2 --folder runs/try

A finished run is used again and an interrupted one goes on; remove the folder to begin anew. The "test" images were
held back from all tuning; the labels of "train" images serve the probes only.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch

from clusterssl import config as cfg
from clusterssl.data import open_source
from clusterssl.errors import EXIT_BAD_INPUT, EXIT_STOPPED, Stopped, UserError
from clusterssl.evals.comparison import Comparison, Scores, difference, summary, with_spread
from clusterssl.evals.gallery import cluster_strips
from clusterssl.report import Gallery, Table, read_run, sparkline, write_report
from clusterssl.report.tables import ASCII_BLOCKS, BLOCKS

ROOT = Path(__file__).resolve().parents[1]
SIZE = (32, 32)
CHECKPOINT = "checkpoint.pth.tar"
MEASURES = {
    "knn": "k-NN, all labels", "few": "probe, 10 labels a class", "nmi": "NMI of clusters",
    "hungarian": "accuracy of clusters",
}  # fmt: skip
NOTE = (
    "Percent, mean ± deviation over seeds, on images that training never saw; the test split was held back from all "
    "tuning, too. Clusters are k-means of their embedding, "
    "found without labels, their accuracy after the best matching with classes (Hungarian). Untrained is, for "
    "each measure, the best of four: raw or with BatchNorm set on the data, clusters of features or of the embedding. "
    "k-NN with all labels is no argument here: raw pixels are near the ceiling already."
)


@dataclass(frozen=True)
class Demo:
    """The demonstration."""

    seeds: tuple[int, ...] = (1001, 1002, 1003)
    """one training each; the default ones were never used for tuning"""
    folder: str = "runs/demo"
    """where runs and report are written"""
    split: Literal["test", "val"] = "test"
    """digits that are scored: test was held back from all tuning, val is for tuning"""
    epochs: int = 0
    """of each training; 0: as many as main_swav.py takes for digits"""


def train(seed: int, folder: Path, epochs: int) -> Path:
    """Run main_swav.py in a process of its own; returns the run directory."""
    run = folder / f"seed-{seed}"
    command = [sys.executable, str(ROOT / "main_swav.py"), "--seed", str(seed), "--dump_path", str(run)]
    command += ["--report", "false", *(["--epochs", str(epochs)] if epochs else [])]
    env = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count() or 1)}
    code = subprocess.run(command, check=False, env=env).returncode
    if code == EXIT_STOPPED:
        raise Stopped("stopped; the same command goes on from the checkpoint")
    if code == EXIT_BAD_INPUT:
        raise UserError(f"{run}: the training refused to start, see above; if old runs are in the way, remove {folder}")
    if code:
        raise RuntimeError(f"the training ended with exit code {code}: {' '.join(command)}")
    return run


def tables(seeds: tuple[int, ...], found: list[dict[str, Scores]]) -> tuple[Table, Table, str]:
    """The table, the one behind it, and what it says in a sentence."""
    rows = summary(found)
    cells = tuple((name, *(with_spread(columns[measure]) for measure in MEASURES)) for name, columns in rows.items())
    every = tuple(
        (name, str(seed), *(f"{scores[measure]:.1f}" for measure in MEASURES))
        for seed, scored in zip(seeds, found, strict=True)
        for name, scores in scored.items()
    )
    few, nmi = ({name: mean(columns[measure]) for name, columns in rows.items()} for measure in ("few", "nmi"))
    verdict = (
        "With 10 labels a class the pretrained network is "
        f"{difference(few['pretrained'] - max(few['raw pixels'], few['untrained']))} the better of pixels and "
        f"untrained; the NMI of its clusters is {difference(nmi['pretrained'] - nmi['untrained'])} untrained."
    )
    columns = tuple(MEASURES.values())
    main = Table(f"SwAV on handwritten digits, {len(seeds)} seeds", ("network", *columns), cells, NOTE)
    return main, Table("Every seed and reading", ("representation", "seed", *columns), every), verdict


def show(table: Table, verdict: str, runs: list[Path], page: Path, began: float) -> None:
    """Print the table, the loss curve, and where things are."""
    blocks = BLOCKS if "utf" in (sys.stdout.encoding or "").lower() else ASCII_BLOCKS
    losses = read_run(runs[0]).curve("loss")[1]
    print("", replace(table, note="").text(), *textwrap.wrap(table.note, 105), "", verdict, sep="\n")
    print(f"loss of the first seed, {losses[0]:.2f} to {losses[-1]:.2f}: {sparkline(losses, blocks=blocks)}")
    checkpoint = runs[0] / CHECKPOINT
    print(f"\nreport   {page} (took {time.monotonic() - began:.0f} s)")
    print(f"network  {checkpoint}")
    print(f"load it  torch.hub.load('{ROOT}', 'backbone', source='local', weights='{checkpoint}')")
    print(f"or       python eval_knn.py --data_path digits --pretrained {checkpoint}")


def main() -> None:
    began = time.monotonic()
    config = cfg.parse(Demo, description=__doc__)
    cfg.require(len(set(config.seeds)) == len(config.seeds), "--seeds: each seed once")
    folder = Path(config.folder)
    runs = []
    for number, seed in enumerate(config.seeds, start=1):
        print(f"\nseed {seed}, {number} of {len(config.seeds)}", flush=True)
        runs.append(train(seed, folder, config.epochs))
    print("\nevaluating", flush=True)
    torch.set_num_threads(1)  # small problems: threads would only wait for one another
    images, scored = (open_source("digits", split=split) for split in ("train", config.split))
    found = [
        Comparison(images, scored, SIZE, seed).everything(str(run / CHECKPOINT), read_run(run).about["config"])
        for seed, run in zip(config.seeds, runs, strict=True)
    ]
    table, detail, verdict = tables(config.seeds, found)
    strips = cluster_strips(str(runs[0] / CHECKPOINT), scored, SIZE, clusters=10, seed=config.seeds[0])
    gallery = Gallery(
        f"Clusters of {config.split} images, the most typical first", strips, "Found by k-means without labels."
    )
    page = folder / "report.html"
    write_report(
        runs, page, title="Demo: SwAV on handwritten digits", lead=verdict, tables=[table, detail], galleries=[gallery]
    )
    show(table, verdict, runs, page, began)


if __name__ == "__main__":
    try:
        cfg.entry(main)
    except SystemExit as ended:
        if ended.code == 130:
            print("\ninterrupted; the same command goes on where this one stopped", file=sys.stderr)
        raise
