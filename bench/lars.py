"""One LARS update of a ResNet-50: ours beside timm's Lars and PyTorch's two SGD, which do not look at norms.

    python bench/lars.py
    python bench/lars.py --device cuda

Every optimiser has its own copy of the network's parameters and gradients, the same numbers in each. They take turns;
medians count. SGD does momentum and weight decay without any norm: "SGD foreach" in few calls for all parameters, "SGD
loop" in a plain loop over them. Which of them is the faster depends on the device.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from gpu import IN_A_ROW
from record import options_of, write_result
from summary import Bar, Line, Summary, against, count, often, times
from timing import in_turns
from torch import Tensor

from clusterssl import config as cfg
from clusterssl.models.build import build_model
from clusterssl.optim import LARS

BARS = {"foreach": Bar("time of an update over that of PyTorch's foreach SGD", 1.3, most=True)}


@dataclass(frozen=True)
class Options:
    """Comparison."""

    arch: str = "resnet50"
    repeats: int = 15
    threads: int = 0
    """0: all cores"""
    device: Literal["cpu", "cuda"] = "cpu"
    out: str = "runs/bench/lars.json"


def parameters(options: Options) -> list[Tensor]:
    """Of SwAV's network, each with a gradient; the same numbers at every call."""
    torch.manual_seed(0)
    net = build_model(options.arch, "imagenet", 2048, 128, 3000).to(options.device)
    for p in net.parameters():
        p.grad = 1e-3 * torch.randn_like(p)
    return list(net.parameters())


def optimizers() -> dict[str, Callable[[list[Tensor]], Any]]:
    """What is compared; timm where it is installed."""
    found: dict[str, Callable[[list[Tensor]], Any]] = {
        "ours": partial(LARS, lr=0.6, weight_decay=1e-6),
        "SGD foreach": partial(torch.optim.SGD, lr=0.6, momentum=0.9, weight_decay=1e-6, foreach=True),
        "SGD loop": partial(torch.optim.SGD, lr=0.6, momentum=0.9, weight_decay=1e-6, foreach=False),
    }
    try:
        from timm.optim import Lars
    except ImportError:
        return found
    same = partial(Lars, lr=0.6, momentum=0.9, weight_decay=1e-6, trust_coeff=0.001, always_adapt=True)
    return {**found, "timm Lars": same}


def summary(result: dict[str, Any]) -> Summary:
    """The result in words."""
    options, found = result["options"], result["update"]
    where = count(options["threads"], "thread") if options["device"] == "cpu" else "GPU"
    return Summary(
        "What does a LARS update cost beside one that does not look at norms?",
        "ours; PyTorch's SGD, foreach and loop; timm's Lars",
        f"Parameters of {options['arch']} with SwAV's heads, {where}; {often(options['repeats'])}.",
        [against(found, "SGD foreach", what="an update")],
        [BARS["foreach"].judge(found["ours"]["over_sgd"], f"CPU time {times(found['ours']['cpu_over_sgd'])}"),
         Line("time of an update over that of PyTorch's SGD loop",
              times(found["ours"]["median"] / found["SGD loop"]["median"]))],
    )  # fmt: skip


def main() -> None:
    options = options_of(Options, __doc__)
    if options.threads:
        torch.set_num_threads(options.threads)
    steps = {name: make(parameters(options)).step for name, make in optimizers().items()}
    taken = in_turns(steps, options.repeats, warmup=2, in_a_row=IN_A_ROW if options.device == "cuda" else 1)
    base, found = taken["SGD foreach"], {}
    for name, time in taken.items():
        found[name] = {**time._asdict(), "over_sgd": time.median / base.median, "cpu_over_sgd": time.cpu / base.cpu}
    about = {**cfg.plain(options), "threads": torch.get_num_threads()}
    write_result(Path(options.out), {"options": about, "update": found}, summary)


if __name__ == "__main__":
    cfg.entry(main)
