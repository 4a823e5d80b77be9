"""Draw the loss of CIFAR-10 CPU runs and the k-NN accuracies of a bench result as one picture.

python bench/cifar10_curve.py runs/bench_cifar10_cpu/ours-2001 bench/results/cifar10_cpu-epyc2.json docs/cifar10.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot


def main() -> None:
    run, result, out = (Path(word) for word in sys.argv[1:4])
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "step" in record]
    found = json.loads(result.read_text())["result"]
    figure, (curve, bars) = pyplot.subplots(1, 2, figsize=(9, 3), width_ratios=(3, 2), layout="constrained")
    curve.plot([one["step"] for one in steps], [one["loss"] for one in steps], linewidth=1)
    curve.axhline(steps[0]["ln_k"], linestyle=":", color="gray")
    curve.annotate("ln K", (steps[-1]["step"], steps[0]["ln_k"]), ha="right", va="bottom", color="gray")
    curve.set(xlabel="step", ylabel="loss", title="SwAV on CIFAR-10, CPU recipe")
    names = {"raw pixels": found["pixels_knn"], **found["mean_knn"]}
    drawn = bars.barh(list(names), list(names.values()), color=["#bbb", "#bbb", "#8ab", "#27c"])
    bars.bar_label(drawn, fmt="%.1f", padding=3)
    bars.invert_yaxis()
    bars.set(xlabel="k-NN accuracy in percent", xlim=(0, 70), title="k-NN, equal CPU time")
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
