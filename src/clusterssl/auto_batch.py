"""--auto_batch: the largest batch that fits, and the learning rate and queues that go with it.

A run with the same flags on tensors without memory tells what a batch needs (`plan.largest`, in a process of its own);
on a GPU one real step of the network confirms it. The rates follow the batch: in proportion with LARS and SGD (Goyal et
al. 2017, arXiv 1706.02677), by the square root with AdamW (Malladi et al. 2022, arXiv 2205.10287).
"""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from clusterssl import child, dist, pulse
from clusterssl.data.loader import signals_held
from clusterssl.dist import World
from clusterssl.errors import Stopped, UserError
from clusterssl.optim import build_optimizer
from clusterssl.precision import Precision
from clusterssl.room import usable_bytes

logger = logging.getLogger(__name__)

C = TypeVar("C")

FIRST_STEP = 2**27
"""bytes of libraries that a process without a GPU has not loaded before its first step"""
FEWEST_STEPS = 10
"""of an epoch: a batch is not made so large that there would be fewer"""
PLANNING_S = 900
"""seconds after which planning is given up"""
_POLL_S = 0.1
_PLANNED = "planned the batch"
"""key on the store of the ranks"""
FACTOR = "rate_factor"
"""the fact of a run by which its given rates were multiplied"""
FOLLOWING = frozenset(["batch_size", "global_batch", "steps_per_epoch", "queue_length", "queue_len", FACTOR])
"""flags and facts that a plan decides, beside the rates"""
NO_MEMORY = ("out of memory", "ALLOC_FAILED")
"""what CUDA, cuBLAS and cuDNN say in errors of no type of their own"""
RATES = ("base_lr", "final_lr", "start_warmup")
QUEUES = (("assignment", "queue_length"), ("objective", "queue_len"))


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
    while batch > 0 and not _fits(batch, attempt):
        batch //= 2
        batch = batch - batch % 8 if batch > 8 else batch
    return batch


def _fits(batch: int, attempt: Callable[[int], None]) -> bool:
    try:
        attempt(batch)
        return True
    except RuntimeError as error:
        short = isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in NO_MEMORY)
        if not short:
            raise
        return False
    finally:
        torch.cuda.empty_cache()


def _factor(optim: Any, batch: int) -> float:
    """Of the rates when the batch is another one."""
    ratio = batch / optim.batch_size
    return math.sqrt(ratio) if optim.optimizer == "adamw" else ratio


def _rates(optim: Any, factor: float) -> dict[str, float]:
    return {name: getattr(optim, name) * factor for name in RATES}


def scaled(config: C, batch: int, ranks: int) -> C:
    """A configuration with another batch, and rates and queues that go with it; queues do not get shorter."""
    optim: Any = config.optim  # type: ignore[attr-defined]
    changes = {"optim": replace(optim, batch_size=batch, **_rates(optim, _factor(optim, batch)))}
    return replace(config, **changes, **_queues(config, batch * optim.accumulate * ranks))  # type: ignore[type-var]


def _queues(config: Any, step: int) -> dict[str, Any]:
    """Groups of a configuration whose queues go with so many images a step, as changes of it."""
    changes: dict[str, Any] = {}
    for (group, name), unit in zip(QUEUES, (step, 1), strict=True):
        part = getattr(config, group, None)
        asked = getattr(part, name, 0)
        if part is not None and asked > 0:
            changes[group] = replace(part, **{name: max(step, -(-asked // unit) * unit)})
    return changes


def with_batch(
    config: C, images: int, world: World, make_model: Callable[[C], Any], precision: Precision,
    before: dict[str, Any] | None,
) -> tuple[C, dict[str, Any]]:  # fmt: skip
    """The configuration with the largest batch that fits on every rank, or with that of the run's first start.

    Args:
        config: with --auto_batch.
        images: of the dataset.
        world: this process's place; what will lie on its device beside the training lies there already.
        make_model: from a configuration to its network.
        precision: of the training.
        before: flags and facts of the first start of a run that goes on.

    Returns:
        The configuration, and what a resume must find among the run's facts.

    Raises:
        UserError: not even one image fits, or the first start's batch cannot be shared by these ranks.
    """
    optim: Any = config.optim  # type: ignore[attr-defined]
    if before is not None:
        chosen, factor = _as_before(config, before, world.size), before.get(FACTOR, 1.0)
        _tell(config, chosen, factor, "as at the first start")
        return chosen, {FACTOR: factor}
    limit = float(dist.all_reduce_(torch.tensor(_room_for_tensors(world.device), dtype=torch.float64), "min"))
    most = max(images // (FEWEST_STEPS * optim.accumulate * world.size), 1)
    logger.info("--auto_batch: looking for the largest batch of which a step takes no more than %.2f GB", limit / 1e9)
    batch = _planned(images, world, limit, most)
    if batch == choices(most)[-1] and optim.batch_size <= most:
        batch = max(batch, optim.batch_size)  # which may lie between the last choice and the limit
    if world.device.type == "cuda":
        batch = _tried(config, batch, world, make_model, precision)
    if batch == 0:
        raise UserError(
            f"--auto_batch: not even a batch of one image fits into {limit / 1e9:.2f} GB; take a smaller --arch, fewer "
            "or smaller crops (--nmb_crops, --size_crops)"
        )
    chosen, factor = scaled(config, batch, world.size), _factor(optim, batch)
    bounded = batch >= choices(most)[-1]
    why = f"so that an epoch keeps {FEWEST_STEPS} steps; memory would allow more"
    _tell(config, chosen, factor, why if bounded else f"the largest within {limit / 1e9:.2f} GB")
    return chosen, {FACTOR: factor}


def _tried(config: Any, batch: int, world: World, make_model: Callable[[Any], Any], precision: Precision) -> int:
    """The largest batch, `batch` or less, of which a step fits on every rank; a rank's problem ends all of them."""
    try:
        batch = confirmed(
            batch, lambda size: trial_step(scaled(config, size, world.size), make_model, world.device, precision)
        )
    except Exception:
        with suppress(UserError):
            dist.raise_together(UserError("--auto_batch: the trial step failed"))
        raise
    dist.raise_together(None)
    return int(dist.all_reduce_(torch.tensor(batch), "min"))


def _room_for_tensors(device: torch.device) -> float:
    """Bytes; on a CPU workspaces and gaps between blocks take as much again."""
    usable = usable_bytes(device)
    return usable if device.type == "cuda" else max(usable - FIRST_STEP, 0.0) / 2


def _planned(images: int, world: World, limit: float, most: int) -> int:
    """What the rehearsal says, asked once for all ranks, all of which hear meanwhile whether they have to stop."""
    problem: UserError | Stopped | None = None
    batch, store = 0, dist.store()
    try:
        if world.is_main:
            per_node = dist.local_size() if world.size % dist.local_size() == 0 else world.size
            facts = {"images": images, "nodes": world.size // per_node, "per_node": per_node, "limit": limit,
                     "most": most, "gpu": world.device.type == "cuda"}  # fmt: skip
            batch = _asked(facts)
        while not world.is_main and not store.check([_PLANNED]):
            pulse.poll("waiting for the plan of --auto_batch")
            time.sleep(_POLL_S)
    except (UserError, OSError) as error:
        problem = UserError(f"--auto_batch: the batch could not be planned: {error}")
    except Stopped as stopped:
        problem = stopped
    finally:
        store.set(_PLANNED, "")
    dist.raise_together(problem)
    return dist.broadcast_object(batch)


def _asked(facts: dict[str, Any]) -> int:
    """The answer of `plan.largest` to this command line."""
    script = str(Path(sys.argv[0]).resolve())
    command = [sys.executable, "-m", "clusterssl.plan.largest", json.dumps(facts), script, *sys.argv[1:]]
    pipe = subprocess.PIPE
    with signals_held():  # which its processes are sent, too
        planner = subprocess.Popen(command, env=child.environment(), stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe,
                                   text=True)  # fmt: skip
    with planner:
        try:
            said, problem = _said(planner)
        finally:
            planner.kill()
    found = next((line for line in reversed(said.split("\n")) if line.startswith("batch ")), "")
    if planner.returncode or not found:
        raise UserError((problem.strip() or f"exit code {planner.returncode}").splitlines()[-1])
    return int(found.split()[1])


def _said(planner: subprocess.Popen[str]) -> tuple[str, str]:
    """What it wrote by its end, unless this rank or the time ends it."""
    end = time.monotonic() + PLANNING_S
    while time.monotonic() < end:
        with suppress(subprocess.TimeoutExpired):
            return planner.communicate(timeout=_POLL_S)
        pulse.poll("planning the batch")
    raise UserError(f"no answer within {PLANNING_S} s; give --batch_size without --auto_batch")


def trial_step(config: Any, make_model: Callable[[Any], Any], device: torch.device, precision: Precision) -> None:
    """Forward and backward pass and optimiser step of the bare network on blank crops, which are gone afterwards."""
    model, data = make_model(config).to(device).train(), config.data
    if config.model.channels_last:
        model.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model.parameters(), config.optim.optimizer, 0.0, 0.0)
    sizes = [size for number, size in zip(data.nmb_crops, data.size_crops, strict=True) for _ in range(number)]
    crops = [torch.zeros(config.optim.batch_size, 3, *size, device=device) for size in sizes]
    with precision.autocast(device):
        outputs = [x for x in tree_leaves(model(crops)) if isinstance(x, Tensor) and x.requires_grad]
    torch.stack([x.float().sum() for x in outputs]).sum().backward()
    optimizer.step()


def _as_before(config: C, before: dict[str, Any], ranks: int) -> C:
    optim: Any = config.optim  # type: ignore[attr-defined]
    batch, left = divmod(before.get("global_batch", 0), optim.accumulate * ranks)
    if left or batch == 0:
        raise UserError(
            f"--auto_batch: the run began with {before.get('global_batch')} images a step, which {ranks} ranks x "
            f"--accumulate {optim.accumulate} cannot share; take another number of ranks"
        )
    rates = _rates(optim, before.get(FACTOR, 1.0))
    queues = _queues(config, before["global_batch"]) if FACTOR in before else {}
    return replace(config, optim=replace(optim, batch_size=batch, **rates), **queues)  # type: ignore[type-var]


def _tell(old: Any, new: Any, factor: float, why: str) -> None:
    rule = "by the square root" if old.optim.optimizer == "adamw" else "in proportion"
    told = [f"--batch_size {new.optim.batch_size} (given: {old.optim.batch_size})",
            f"--base_lr {new.optim.base_lr:g} (given: {old.optim.base_lr:g}, {rule}: x {factor:g})"]  # fmt: skip
    told += [f"--{name} {getattr(new.optim, name):g}" for name in RATES[1:] if getattr(new.optim, name)]
    for group, name in QUEUES:
        if getattr(getattr(new, group, None), name, 0) > 0:
            told.append(f"--{name} {getattr(getattr(new, group), name)}")
    logger.info("--auto_batch: %s; %s", ", ".join(told), why)
