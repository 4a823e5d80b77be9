"""--auto_batch: the largest batch that fits, and the learning rate and queues that go with it.

A run with the same flags on tensors without memory tells what a batch needs (`plan.largest`, in a process of its own);
on a GPU one real step of the network confirms it. The rates follow the batch: in proportion with LARS and SGD (Goyal et
al. 2017, arXiv 1706.02677), by the square root with AdamW (Malladi et al. 2022, arXiv 2205.10287).
"""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from clusterssl import dist
from clusterssl.data.cache import available_bytes
from clusterssl.dist import World
from clusterssl.errors import UserError
from clusterssl.optim import build_optimizer
from clusterssl.precision import Precision

logger = logging.getLogger(__name__)

C = TypeVar("C")

USABLE = {"cuda": 0.9, "cpu": 0.5}
"""share of the free memory for tensors; workspaces and gaps between blocks take the rest, as much again on a CPU"""
FIRST_STEP = 2**27
"""bytes of libraries that a process without a GPU has not loaded before its first step"""
FEWEST_STEPS = 10
"""of an epoch: a batch is not made so large that there would be fewer"""


def choices(most: int) -> list[int]:
    """Batches to choose from, ascending: 1, 2, 4 and the multiples of 8."""
    return [n for n in (1, 2, 4, *range(8, most + 1, 8)) if n <= most]


def largest(needed: Callable[[int], int], limit: float, most: int) -> int:
    """The largest of `choices(most)` of which `needed`, bytes that do not shrink as batches grow, is within `limit`.

    0 where none is. What two batches need foretells the others, so that a few questions suffice.
    """
    ladder = choices(most)
    fits, misfits = -1, len(ladder)
    known: dict[int, int] = {}
    place = min(3, len(ladder) - 1)
    while misfits - fits > 1:
        known[place] = needed(ladder[place])
        if known[place] <= limit:
            fits = place
        else:
            misfits = place
        guess = _foretold(ladder, known, limit) if len(known) < 6 else (fits + misfits) // 2
        place = min(max(guess, fits + 1), misfits - 1)
    return ladder[fits] if fits >= 0 else 0


def _foretold(ladder: list[int], known: dict[int, int], limit: float) -> int:
    """Place of the largest batch that fits if bytes grow as between the two largest batches that are known."""
    if len(known) < 2:
        return next(iter(known)) + 1
    low, high = sorted(known)[-2:]
    slope = (known[high] - known[low]) / (ladder[high] - ladder[low])
    batch = ladder[high] + (limit - known[high]) / slope if slope > 0 else ladder[-1]
    return max(sum(n <= batch for n in ladder) - 1, 0)


def confirmed(batch: int, attempt: Callable[[int], None]) -> int:
    """`batch`, or the first of its halves at which `attempt` does not run out of memory; 0 when none does."""
    while batch > 0:
        try:
            attempt(batch)
            return batch
        except torch.OutOfMemoryError:
            batch //= 2
            batch = batch - batch % 8 if batch > 8 else batch
        torch.cuda.empty_cache()
    return 0


def scaled(config: C, batch: int, ranks: int) -> C:
    """A configuration with another batch, and rates and queues that go with it; queues do not get shorter."""
    optim: Any = config.optim  # type: ignore[attr-defined]
    ratio = batch / optim.batch_size
    factor = math.sqrt(ratio) if optim.optimizer == "adamw" else ratio
    rates = {name: getattr(optim, name) * factor for name in ("base_lr", "final_lr", "start_warmup")}
    changes: dict[str, Any] = {"optim": replace(optim, batch_size=batch, **rates)}
    step = batch * optim.accumulate * ranks
    for group, name, unit in (("assignment", "queue_length", step), ("objective", "queue_len", 1)):
        part = getattr(config, group, None)
        asked = getattr(part, name, 0)
        if part is not None and asked > 0:
            changes[group] = replace(part, **{name: max(step, -(-asked // unit) * unit)})
    return replace(config, **changes)  # type: ignore[type-var]


def with_batch(config: C, images: int, world: World, make_model: Callable[[C], Any]) -> C:
    """The configuration with the largest batch that fits on every rank; that of the run's first start if there was one.

    Args:
        config: with --auto_batch.
        images: of the dataset.
        world: this process's place.
        make_model: from a configuration to its network.

    Raises:
        UserError: not even one image fits, or the first start's batch cannot be shared by these ranks.
    """
    run, optim = config.run, config.optim  # type: ignore[attr-defined]
    before = dist.broadcast_object(_first_start(Path(run.dump_path)) if world.is_main else None)
    if before is not None:
        return _as_before(config, before, world.size)
    free = torch.cuda.mem_get_info(world.device)[0] if world.device.type == "cuda" else _share_of_memory()
    limit = float(dist.all_reduce_(torch.tensor(USABLE[world.device.type] * free, dtype=torch.float64), "min"))
    most = max(images // (FEWEST_STEPS * optim.accumulate * world.size), 1)
    batch = _planned(config, images, world, limit, most)
    if world.device.type == "cuda":
        batch = confirmed(batch, lambda size: one_step(scaled(config, size, world.size), make_model, world.device))
    batch = int(dist.all_reduce_(torch.tensor(batch), "min"))
    if batch == 0:
        raise UserError(
            f"--auto_batch: not even a batch of one image fits into {limit / 1e9:.2f} GB; take a smaller --arch, fewer "
            "or smaller crops (--nmb_crops, --size_crops)"
        )
    chosen = scaled(config, batch, world.size)
    _tell(config, chosen, limit, batch == choices(most)[-1])
    return chosen


def _share_of_memory() -> float:
    return max(available_bytes() / dist.local_size() - FIRST_STEP, 0.0)


def _planned(config: Any, images: int, world: World, limit: float, most: int) -> int:
    """What the rehearsal says, asked once for all ranks."""
    problem, batch = "", 0
    if world.is_main:
        per_node = dist.local_size() if world.size % dist.local_size() == 0 else world.size
        facts = {"images": images, "nodes": world.size // per_node, "per_node": per_node, "limit": limit, "most": most,
                 "gpu": world.device.type == "cuda"}  # fmt: skip
        script = str(Path(sys.argv[0]).resolve())
        paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        command = [sys.executable, "-m", "clusterssl.plan.largest", json.dumps(facts), script, *sys.argv[1:]]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        said = done.stdout.split("\n")
        found = next((line for line in reversed(said) if line.startswith("batch ")), "")
        if done.returncode == 0 and found:
            batch = int(found.split()[1])
        else:
            problem = (
                f"--auto_batch: the batch could not be planned: {(done.stderr.strip() or 'no answer').splitlines()[-1]}"
            )
    problem = dist.broadcast_object(problem)
    if problem:
        raise UserError(problem)
    return dist.broadcast_object(batch)


def one_step(config: Any, make_model: Callable[[Any], Any], device: torch.device) -> None:
    """Forward and backward pass and optimiser step of the bare network on blank crops, which are gone afterwards."""
    model, data = make_model(config).to(device).train(), config.data
    if config.model.channels_last:
        model.to(memory_format=torch.channels_last)
    precision = Precision(torch.bfloat16 if config.model.use_fp16 and device.type == "cuda" else None)
    optimizer = build_optimizer(model.parameters(), config.optim.optimizer, 0.0, 0.0)
    sizes = [size for number, size in zip(data.nmb_crops, data.size_crops, strict=True) for _ in range(number)]
    crops = [torch.zeros(config.optim.batch_size, 3, *size, device=device) for size in sizes]
    with precision.autocast(device):
        outputs = [x for x in tree_leaves(model(crops)) if isinstance(x, Tensor) and x.requires_grad]
    torch.stack([x.float().sum() for x in outputs]).sum().backward()
    optimizer.step()


def _first_start(folder: Path) -> dict[str, Any] | None:
    """Flags and facts of the run's first start; None where there was none, or where opening the run will refuse it."""
    try:
        record = json.loads((folder / "run.json").read_text())
        return {**record["config"], **record["facts"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _as_before(config: C, before: dict[str, Any], ranks: int) -> C:
    optim: Any = config.optim  # type: ignore[attr-defined]
    batch, left = divmod(before.get("global_batch", 0), optim.accumulate * ranks)
    if left or batch == 0:
        raise UserError(
            f"--auto_batch: the run began with {before.get('global_batch')} images a step, which {ranks} ranks x "
            f"--accumulate {optim.accumulate} cannot share; take another number of ranks"
        )
    rates = {name: before[name] for name in ("base_lr", "final_lr", "start_warmup") if name in before}
    changes: dict[str, Any] = {"optim": replace(optim, batch_size=batch, **rates)}
    for group, name in (("assignment", "queue_length"), ("objective", "queue_len")):
        part = getattr(config, group, None)
        if hasattr(part, name) and name in before:
            changes[group] = replace(part, **{name: before[name]})  # type: ignore[type-var]
    return replace(config, **changes)  # type: ignore[type-var]


def _tell(old: Any, new: Any, limit: float, bounded: bool) -> None:
    rule = "square root" if old.optim.optimizer == "adamw" else "in proportion"
    told = [f"--batch_size {new.optim.batch_size} (given: {old.optim.batch_size})",
            f"--base_lr {new.optim.base_lr:g} (given: {old.optim.base_lr:g}, {rule})"]  # fmt: skip
    for group, name in (("assignment", "queue_length"), ("objective", "queue_len")):
        if getattr(getattr(new, group, None), name, 0) > 0:
            told.append(f"--{name} {getattr(getattr(new, group), name)}")
    why = f"an epoch keeps {FEWEST_STEPS} steps" if bounded else f"the largest within {limit / 1e9:.2f} GB"
    logger.info("--auto_batch: %s; %s", ", ".join(told), why)
