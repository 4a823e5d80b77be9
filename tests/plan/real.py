"""What real ranks hold, send and write, counted where torch does it, to be compared with plans."""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.profiler import ProfilerActivity, profile

from clusterssl.dist import World
from clusterssl.engine import Parts, fit
from clusterssl.plan.blueprint import Blueprint, read_script
from clusterssl.pretrain import assemble
from tests.launch import ROOT

STEP = 4
"""whose messages are counted: queues are full, and nothing is logged before the next one"""


class Wire:
    """Adds up what is given to collectives."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.nbytes: Counter[str] = Counter()

    def note(self, kind: str, nbytes: int) -> None:
        self.calls[kind] += 1
        self.nbytes[kind] += nbytes

    def listen(self, model: Any) -> None:
        reduce, gather, coalesced = torch_dist.all_reduce, torch_dist.all_gather, torch_dist._broadcast_coalesced

        def all_reduce(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.note("all-reduce", x.nbytes)
            return reduce(x, *args, **kwargs)

        def all_gather(parts: list[torch.Tensor], x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.note("all-gather", x.nbytes)
            return gather(parts, x, *args, **kwargs)

        def broadcast(group: Any, tensors: list[torch.Tensor], *args: Any) -> Any:
            for dtype in {x.dtype for x in tensors}:
                self.note("broadcast", sum(x.nbytes for x in tensors if x.dtype == dtype))
            return coalesced(group, tensors, *args)

        torch_dist.all_reduce, torch_dist.all_gather = all_reduce, all_gather
        torch_dist._broadcast_coalesced = broadcast

        assert isinstance(model, DistributedDataParallel)
        model.register_comm_hook(self, _averaged)


def _averaged(wire: Wire, bucket: torch_dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """In sight of the wire, as DistributedDataParallel's own all-reduce is not."""
    return allreduce_hook(torch_dist.group.WORLD, bucket)


def on_two_ranks(rank: int, world_size: int, script: str, words: list[str], folder: str) -> dict[str, Any]:
    """One short training: bytes and calls of one step, and bytes of what lives."""
    blueprint = read_script(ROOT / script, [*words, "--dump_path", folder], 1, world_size)
    parts = real_parts(blueprint, World(rank, world_size))
    wire, at = Wire(), list[tuple[Counter[str], Counter[str]]]()
    wire.listen(parts.model)
    register_optimizer_step_pre_hook(lambda *_: at.append((wire.calls.copy(), wire.nbytes.copy())))
    fit(parts)
    before, after = at[STEP - 1], at[STEP]
    parameters = [p for group in parts.optimizer.param_groups for p in group["params"]]
    state = [x for values in parts.optimizer.state.values() for x in values.values() if isinstance(x, torch.Tensor)]
    return {
        "calls": dict(after[0] - before[0]), "bytes": dict(after[1] - before[1]),
        "parameters": sum(p.nbytes for p in parameters), "optimiser": sum(x.nbytes for x in state),
        "files": {path.name: path.stat().st_size for path in Path(folder).glob("checkpoint.*")},
    }  # fmt: skip


def real_parts(blueprint: Blueprint, world: World) -> Parts:
    return assemble(
        blueprint.name, blueprint.config, world, blueprint.make_model, blueprint.make_method, **blueprint.more
    )


def peak_of_a_step(rank: int, world_size: int, script: str, words: list[str], folder: str) -> int:
    """Bytes by which forward and backward pass of one step exceed what lived before, as the profiler saw them."""
    parts = real_parts(read_script(ROOT / script, [*words, "--dump_path", folder], 1, 1), World())
    parts.method.optimizer = parts.optimizer
    parts.method.begin_epoch(0)
    parts.model.train()
    batch = next(parts.feed.loader.epoch(0))[0]
    crops = parts.feed.crops(batch)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = parts.method.loss(crops, batch.index)
        loss.backward()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    held = peak = 0
    for event in events:
        held += event.nbytes()
        peak = max(peak, held)
    return peak
