"""A SwAV training step: ours beside the bare network's forward and backward pass, a plain step and lightly's modules.

    python bench/train_step.py                                                      # ResNet-18, 2 x 32 px, any CPU
    python bench/train_step.py --device cuda --arch resnet50 --size_crops 224 96 --nmb_crops 2 6 --batch_size 256
    python bench/train_step.py --device cuda --arch resnet50w2 --size_crops 224 96 --nmb_crops 2 6 --batch_size 128

"ours" is the step of `fit`: augmentation of uint8 crops, forward, assignment, loss, backward, LARS. "bare" is
the same network on augmented crops with a sum for a loss and no optimiser: what the hardware allows. "eager" is the
step as published, written anew: planar layout, the published assignment, a sum over pairs of crops, SGD. "lightly" puts
lightly's head, prototypes and loss on the same backbone, with SGD. Eager and lightly get augmented crops. On a GPU all
use bf16 autocast, ours is checked not to wait for it, and the memory a step needs beyond what lies there before it is
told. The systems take turns; medians count.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
import torch.nn.functional as F
from gpu import IN_A_ROW, memory, never_waits
from record import options_of, write_result
from sinkhorn import published
from summary import GPU, Bar, Line, Summary, Table, count, often, quantity, spread, times
from timing import in_turns
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from trained import ROOT

from clusterssl import config as cfg
from clusterssl.data import Batch, MultiCropDataset
from clusterssl.dist import World
from clusterssl.plan.blueprint import read_script
from clusterssl.pretrain import assemble, keep_freed_memory, prototype_net
from clusterssl.step import Step
from main_swav import Config

TEMPERATURE, EPSILON, ITERATIONS = 0.1, 0.05, 3
LOW, HIGH = {2: (0.14, 0.05), 1: (0.14,)}, {2: (1.0, 0.14), 1: (1.0,)}
PASSED = 10_240
"""synthetic images for methods that pass over all of them before they begin; no fewer than their clusters"""
System = Callable[[], Any]
BARS = {
    "bare": Bar("share of the bare step's images/s on a GPU", 85, "%", needs=GPU),
    "eager": Bar("plain eager step's time over ours on a GPU", 1.25, needs=GPU),
    "waits": Bar("waits for the GPU between log points", 0, "", most=True, needs=GPU),
    "augmentation": Bar("augmentation's share of a GPU's step, 2 x 224 + 6 x 96 px", 6, "%", most=True, needs=GPU),
}


@dataclass(frozen=True)
class Options:
    """Comparison."""

    method: Literal["swav", "deepclusterv2", "sela", "deepcluster", "selfclassifier"] = "swav"
    """others than swav are compared with the bare step alone, and have their own numbers of prototypes"""
    arch: str = "resnet18"
    nmb_crops: tuple[int, ...] = (2,)
    size_crops: tuple[int, ...] = (32,)
    batch_size: int = 32
    nmb_prototypes: int = 3000
    compile: bool = False
    """our backbone by torch.compile"""
    cuda_graphs: bool = False
    """and replayed as CUDA graphs"""
    repeats: int = 5
    threads: int = 0
    """0: all cores"""
    device: Literal["cpu", "cuda"] = "cpu"
    out: str = "runs/bench/train_step.json"


def prepared(options: Options, folder: str) -> tuple[Step, Batch]:
    """Our step, as the method's script sets it up, and one batch of uint8 crops."""
    images = max(options.batch_size, 64 if options.method == "swav" else PASSED)
    words: dict[str, Any] = {
        "data_path": f"synthetic:{images}:{max(options.size_crops)}x{max(options.size_crops)}", "arch": options.arch,
        "batch_size": options.batch_size, "compile": options.compile, "cuda_graphs": options.cuda_graphs,
        "device": options.device, "workers": 0, "epochs": 10_000, "dump_path": folder, **of_method(options),
    }  # fmt: skip
    argv = [word for name, value in words.items() for word in (f"--{name}", *_words(value))]
    plan = read_script(ROOT / f"main_{options.method}.py", argv, 1, 1)
    world = World(device=torch.device(options.device))
    parts = assemble(plan.name, plan.config, world, plan.make_model, plan.make_method, **plan.more)
    loader = parts.feed.loader
    keys = [(0, i) for i in range(options.batch_size)]
    batch = MultiCropDataset(loader.source, loader.multicrop, seed=0).__getitems__(keys)
    if options.device == "cuda":
        batch = batch._replace(crops=[x.pin_memory() for x in batch.crops], index=batch.index.pin_memory())
    step = Step(parts)
    if options.method != "swav":
        parts.method.begin_epoch(0)
    parts.model.train()
    return step, batch


def of_method(options: Options) -> dict[str, Any]:
    """Flags that not all methods have."""
    if options.method == "deepcluster":  # one crop
        return {"size_crops": options.size_crops[:1]}
    n = len(options.size_crops)
    crops = {
        "nmb_crops": options.nmb_crops, "size_crops": options.size_crops, "min_scale_crops": LOW[n],
        "max_scale_crops": HIGH[n],
    }  # fmt: skip
    return crops | ({"nmb_prototypes": options.nmb_prototypes} if options.method == "swav" else {})


def _words(value: Any) -> list[str]:
    return [str(word) for word in (value if isinstance(value, tuple) else (value,))]


def bare(step: Step, crops: list[Tensor]) -> System:
    """Forward and backward pass of our network."""
    model, feed = step.parts.model, step.feed

    def run() -> None:
        with feed.autocast():
            found = model(crops)
        sum(x.float().sum() for x in tree_leaves(found)).backward()
        model.zero_grad(set_to_none=True)

    return run


def swapped(scores: list[Tensor]) -> Tensor:
    """SwAV's loss of the first two crops' assignments, as a sum over pairs of crops."""
    loss = torch.zeros((), device=scores[0].device)
    for a in (0, 1):
        q_BK = published(scores[a].detach().float(), EPSILON, ITERATIONS)
        for v in range(len(scores)):
            if v != a:
                log_p_BK = F.log_softmax(scores[v].float() / TEMPERATURE, dim=1)
                loss = loss - (q_BK * log_p_BK).sum(1).mean() / (2 * (len(scores) - 1))
    return loss


def stepping(network: nn.Module, loss: Callable[[], Tensor], step: Step) -> System:
    """A step with plain SGD."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-6)

    def run() -> None:
        with step.feed.autocast():
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def eager(step: Step, crops: list[Tensor], options: Options) -> System:
    """The published step: planar layout, one forward pass a resolution, published assignment, pairs of crops, SGD."""
    network = _new_network(options, step)
    planar = [x.contiguous() for x in crops]

    def loss() -> Tensor:
        with torch.no_grad():
            network.prototypes.weight.copy_(F.normalize(network.prototypes.weight, dim=1))
        return swapped(list(network(planar)[1].chunk(len(planar))))

    return stepping(network, loss, step)


def lightly(step: Step, crops: list[Tensor], options: Options) -> System:
    """lightly's SwAV around the same backbone."""
    from lightly.loss import SwaVLoss
    from lightly.models.modules import SwaVProjectionHead, SwaVPrototypes

    backbone = _new_network(options, step).backbone
    head = SwaVProjectionHead(int(backbone.feature_dim), 2048, 128)
    prototypes = SwaVPrototypes(128, options.nmb_prototypes)
    network = nn.ModuleList([backbone, head, prototypes]).to(options.device).train()
    criterion = SwaVLoss(TEMPERATURE, ITERATIONS, EPSILON)
    planar = [x.contiguous() for x in crops]

    def loss() -> Tensor:
        prototypes.normalize()
        scores = [prototypes(F.normalize(head(backbone(x).flatten(1)), dim=1)).float() for x in planar]
        return criterion(scores[:2], scores[2:])

    return stepping(network, loss, step)


def _new_network(options: Options, step: Step) -> Any:
    config = cfg.parse(Config, ["--data_path", "synthetic", "--arch", options.arch, "--size_crops",
                                *map(str, options.size_crops), "--nmb_crops", *map(str, options.nmb_crops),
                                "--min_scale_crops", *map(str, LOW[len(options.size_crops)]),
                                "--max_scale_crops", *map(str, HIGH[len(options.size_crops)])])  # fmt: skip
    return prototype_net(options.nmb_prototypes)(config).to(step.parts.world.device).train()


def systems(step: Step, batch: Batch, options: Options) -> dict[str, System]:
    """What is compared; lightly where it is installed."""
    crops = step.feed.crops(batch)
    found: dict[str, System] = {
        "ours": lambda: step(0, [batch]),
        "augmentation alone": lambda: step.feed.crops(batch),
        "bare": bare(step, crops),
    }
    if options.method != "swav":
        return found
    found["eager"] = eager(step, crops, options)
    try:
        found["lightly"] = lightly(step, crops, options)
    except ImportError:
        print("lightly is not installed: left out")
    return found


def judged(result: dict[str, Any]) -> list[Line]:
    """The figures that count."""
    found = result["steps"]
    ours, bare, eager = (found[name]["median"] if name in found else 0 for name in ("ours", "bare", "eager"))
    if result["options"]["device"] == "cpu":
        lines = [Line("bare step's time over ours", times(bare / ours))]
        return [*lines, Line("plain eager step's time over ours", times(eager / ours))] if eager else lines
    lines = [BARS["bare"].judge(100 * bare / ours)] + ([BARS["eager"].judge(eager / ours)] if eager else [])
    if "never_waits" in result:
        lines.append(BARS["waits"].judge(0 if result["never_waits"] else 1))
    if result["options"]["size_crops"] == [224, 96]:
        lines.append(BARS["augmentation"].judge(100 * found["augmentation alone"]["median"] / ours))
    return lines


def summary(result: dict[str, Any]) -> Summary:
    """The result in words."""
    options, found = result["options"], result["steps"]
    rows = [
        (name, spread(one), times(one["median"] / found["ours"]["median"]), quantity(one["images_per_s"], ""),
         *([quantity(1024 * result["gib"][name], "MiB")] if "gib" in result else []))
        for name, one in found.items()
    ]  # fmt: skip
    crops = " + ".join(f"{n} x {side}" for n, side in zip(options["nmb_crops"], options["size_crops"], strict=True))
    threads = count(options["threads"], "thread") if options["threads"] else "all cores"
    how = ", ".join([options.get("method", "swav"), options["arch"], f"{crops} px", f"{options['batch_size']} images",
                     *(name for name in ("compile", "cuda_graphs") if options.get(name))])  # fmt: skip
    peers = ", ".join(name for name in found if name not in ("ours", "augmentation alone"))
    return Summary(
        "How much of what the hardware allows does a training step reach, and how long do others' steps take?",
        f"ours; {peers}; {how}",
        f"{how}; {threads if options['device'] == 'cpu' else 'GPU'}; {often(options['repeats'])}.",
        [Table(("", "a step", "over ours", "images/s", *(["memory"] if "gib" in result else [])), rows)],
        judged(result),
        '"bare" is forward and backward pass without loss, optimiser or augmentation; "eager" the published step.',
    )


def main() -> None:
    options = options_of(Options, __doc__)
    if options.threads:
        torch.set_num_threads(options.threads)
    logging.disable(logging.INFO)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        step, batch = prepared(options, folder)
        calls = systems(step, batch, options)
        found = in_turns(calls, options.repeats, warmup=2, in_a_row=IN_A_ROW if options.device == "cuda" else 1)
        about: dict[str, Any] = {}
        if options.device == "cuda":
            about = {"never_waits": never_waits(calls["ours"])}
            if not options.cuda_graphs:  # what graphs take is allocated once and for all
                about["gib"] = memory(calls)
        step.parts.run.close()
    rows = {}
    for name, one in found.items():
        speed = options.batch_size / one.median
        share = found["bare"].median / one.median
        rows[name] = {**one._asdict(), "images_per_s": speed, "bare_over_this": share}
    write_result(Path(options.out), {"options": cfg.plain(options), "steps": rows, **about}, summary)


if __name__ == "__main__":
    cfg.entry(main)
