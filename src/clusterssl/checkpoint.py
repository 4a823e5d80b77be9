"""What a pretraining checkpoint holds: weights under their published names, optimiser, the method's state."""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from clusterssl import dist
from clusterssl.batchnorm import same_on_all_ranks
from clusterssl.dist import World
from clusterssl.errors import UserError
from clusterssl.models.build import MultiCropNet
from clusterssl.models.weights import load_published, published_state_dict
from clusterssl.run import Run


class Stateful(Protocol):
    """A method, as far as checkpoints go."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def distribute(model: nn.Module, world: World, compression: str = "none") -> nn.Module:
    """Wrap a model so that gradients are averaged over ranks, sent as `compression` says; alone it stays as it is.

    Buffers, which the wrapper would send from rank 0 before every forward pass, are sent at the start only where ranks
    keep them the same by themselves. The wrapper's `static_graph` stays off: with it, passes under `no_sync`, which
    --accumulate makes, can leave gradients that are not averaged (pytorch/pytorch#187732), and without it no step was
    measured to be slower.
    """
    if world.size == 1:
        return model
    ids = [world.device.index] if world.device.type == "cuda" else None
    wrapped = DistributedDataParallel(model, ids, gradient_as_bucket_view=True)
    wrapped.broadcast_buffers = not same_on_all_ranks(model)  # the argument has another name in each version
    if compression == "bf16":
        wrapped.register_comm_hook(None, dist.bf16_compress_hook)
    return wrapped


def bare(model: nn.Module) -> MultiCropNet:
    """The model inside the distributed wrapper."""
    return cast(MultiCropNet, model.module if isinstance(model, DistributedDataParallel) else model)


def save(
    run: Run,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    method: Stateful,
    more: dict[str, Any],
    step: int,
    keep_as: str = "",
    wait: bool = True,
) -> None:
    """Write a checkpoint of all ranks; a collective call.

    Args:
        run: where to.
        model: as `distribute` gave it.
        optimizer: of the model.
        method: whose state goes along, its "sharded" tensors split over ranks.
        more: further plain values and tensors.
        step: optimiser steps done.
        keep_as: name of a copy that is kept.
        wait: until it is complete; otherwise it is written from a copy, by a thread.

    Raises:
        UserError: weights are not finite, or a file could not be written, perhaps one of the save before; the last
            complete checkpoint is intact.
    """
    check_weights(model, run, step)
    shared, sharded = _state(model, optimizer, method)
    run.saver.begin({**more, **shared}, sharded, step=step, keep_as=keep_as, copy=not wait)
    if wait:
        run.saver.finish()


def rehearse(run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, method: Stateful) -> float:
    """Seconds that a checkpoint takes, from one that is written and removed; a collective call.

    Raises:
        UserError: it could not be written.
    """
    shared, sharded = _state(model, optimizer, method)
    coming = [p.detach() for p in model.parameters() if p.requires_grad and not optimizer.state.get(p)]
    return run.saver.rehearse({**shared, "momenta before the first step": coming}, sharded)


def _state(
    model: nn.Module, optimizer: torch.optim.Optimizer, method: Stateful
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What all ranks have alike, and what is this rank's; tensors are shared, not copied."""
    state = method.state_dict()
    sharded = state.pop("sharded", {})
    weights = {"state_dict": published_state_dict(bare(model)), "optimizer": optimizer.state_dict()}
    return {**weights, "method_state": state}, sharded


def load(run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, method: Stateful) -> dict[str, Any] | None:
    """Put the newest checkpoint's state in place; returns all it holds, None when there is none."""
    state = run.load()
    if state is not None:
        load_published(bare(model), state["state_dict"])
        decays = [group["weight_decay"] for group in optimizer.param_groups]
        optimizer.load_state_dict(state["optimizer"])
        for group, decay in zip(optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay  # a flag of this start, not of the checkpoint
        method.load_state_dict({**state["method_state"], "sharded": state["sharded"]})
    return state


def check_weights(model: nn.Module, run: Run, step: int) -> None:
    """Never let a checkpoint of weights that are not finite replace a good one."""
    norms = torch._foreach_norm([p.detach() for p in model.parameters()])
    if not bool(torch.isfinite(torch.stack([norm.float() for norm in norms])).all()):
        raise UserError(f"weights were not finite after step {step - 1}; {way_back(run)}")


def way_back(run: Run) -> str:
    """What a user can do when a run diverged."""
    kept = run.has_checkpoint()
    where = f"the last good checkpoint in {run.folder} is kept, go on from it" if kept else "start again"
    return f"{where} with a lower --base_lr or a longer --warmup_epochs (on a GPU also --use_fp16 false)"
