"""Train healthy and ailing runs on the built-in digits, draw their curves, keep their verdicts.

    python docs/diagnosis.py                 # 12 epochs each, some 3 minutes of one CPU core
    python docs/diagnosis.py healthy smooth  # these only

Runs lie in runs/diagnosis and are used again; figures and docs/figures/diagnosis.json are written from them.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from drawing import BLUE, FOLDER, GREY, ROOT, canvas, keep

from clusterssl.report import read_run
from clusterssl.report.verdict import verdict

RUNS = {
    "healthy": "",
    "smooth": "--epsilon 1",
    "imagenet": "--optimizer lars --base_lr 4.8 --epsilon 0.05 --color_jitter 0.8 --gray_p 0.2 --seed 32",
    "temperature": "--temperature 3",
    "rate": "--base_lr 0.3",
    "diverged": "--optimizer sgd --base_lr 1000",
    "queue": "--batch_size 20 --queue_length 900 --epoch_queue_starts 1",
}
"""flags besides those of the digits"""
COMMON = "--epochs 12 --log_freq 2 --device cpu"


def command(key: str) -> str:
    """What a person types for this run."""
    return " ".join(f"python main_swav.py {COMMON} {RUNS[key]} --dump_path runs/diagnosis/{key}".split())


def trained(key: str) -> tuple[int, list[str]]:
    """Train unless that was done; exit code and what was printed."""
    folder = ROOT / "runs" / "diagnosis" / key
    said = folder / "printed.json"
    if not said.exists():
        words = [sys.executable, *shlex.split(command(key))[1:]]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        said.write_text(json.dumps([done.returncode, (done.stdout + done.stderr).splitlines()]))
    code, lines = json.loads(said.read_text())
    return code, lines


def findings(key: str) -> dict[str, Any]:
    """Exit code, the lines that tell good from bad, and the last numbers."""
    code, lines = trained(key)
    run = read_run(ROOT / "runs" / "diagnosis" / key)
    told = [line for line in lines if line.startswith("collapse:") or ": error: " in line]
    said = [f"{remark.kind}: {remark.text}" for remark in verdict(run) if "images/s" not in remark.text]
    measures = ("loss", "ln_k", "entropy", "perplexity", "dead_share", "rankme")
    last = {name: round(run.curve(name)[1][-1], 3) for name in measures if run.curve(name)[1]}
    return {"command": command(key), "exit": code, "printed": told, "report": said, "last": last}


def draw(key: str) -> None:
    """Loss, entropy of the assignments and effective rank over steps; use of the prototypes at the end."""
    run = read_run(ROOT / "runs" / "diagnosis" / key)
    figure, panels = canvas(4, width=9.0, height=1.9)
    level = run.last("ln_k") or 0.0
    for axes, name, title in zip(
        panels, ("loss", "entropy", "rankme"), ("loss", "entropy of assignments", "effective rank"), strict=False
    ):
        axes.plot(*run.curve(name), color=BLUE, linewidth=1.2)
        axes.set(title=title, xlabel="step")
        axes.set_ylim(bottom=0)
        if name != "rankme":
            axes.axhline(level, color=GREY, linestyle=":")
            axes.set_ylim(0, max(1.25 * level, 1.05 * max(run.curve(name)[1])))
    panels[0].annotate("ln K", (0, level), xytext=(2, 2), textcoords="offset points", color=GREY)
    counts = sorted(occupancy(key), reverse=True)
    if counts:
        panels[3].stairs([count / max(sum(counts), 1) for count in counts], fill=True, color=BLUE)
        panels[3].axhline(1 / len(counts), color=GREY, linestyle=":")
    panels[3].set(title="images per prototype", xlabel="prototypes, most used first")
    panels[3].yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g}%")
    keep(figure, f"run_{key}")


def occupancy(key: str) -> list[int]:
    """Images per prototype in the last epoch that ended."""
    lines = (ROOT / "runs" / "diagnosis" / key / "metrics.jsonl").read_text().splitlines()
    ends = [record for record in map(json.loads, lines) if "epoch_end" in record]
    return list(ends[-1]["occupancy"]) if ends else []


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / "diagnosis.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for key in sys.argv[1:] or RUNS:
        found[key] = findings(key)
        draw(key)
        print(key, json.dumps(found[key], indent=1), flush=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
