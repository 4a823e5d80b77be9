"""Optimisers and the learning-rate schedule: LARS as SwAV was trained with, warm-up and cosine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from clusterssl.gpu import for_kernels


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step is scaled per parameter tensor by its norm (You et al. 2017, arXiv 1708.03888).

    For each parameter p with gradient g and both norms non-zero:
        g <- trust * ||p|| / (||g|| + wd ||p|| + eps) * (g + wd p)
    and otherwise g stays as it is, without weight decay; then v <- momentum v + g, p <- p - lr v. This is what apex's
    LARC (clip off) around torch's SGD computes, the optimiser of the published SwAV runs. On a GPU all tensors of a
    group are updated by one kernel where Triton is, and nothing waits for it.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        eps: float = 1e-8,
    ) -> None:
        """Args as in the formula above; `params` are tensors or groups with their own `lr` and `weight_decay`."""
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
        }
        super().__init__(params, defaults)
        self._kernels: dict[tuple[int, ...], Any] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; parameters without gradient keep their value and their momentum."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            tensors = [p for p in group["params"] if p.grad is not None]
            kinds = {(p.device, p.dtype) for p in tensors}
            for kind in sorted(kinds, key=str):
                self._update([p for p in tensors if (p.device, p.dtype) == kind], group)
        return loss

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        grads = [p.grad for p in params if p.grad is not None]
        decay = group["weight_decay"]
        param_norms, grad_norms = torch._foreach_norm(params), torch._foreach_norm(grads)
        # One small tensor of all norms instead of a few kernels per parameter.
        p_norm, g_norm = torch.stack(param_norms), torch.stack(grad_norms)
        adapted = (p_norm != 0) & (g_norm != 0)
        ratio = group["trust_coefficient"] * p_norm / (g_norm + decay * p_norm + group["eps"])
        scale = torch.where(adapted, ratio, torch.ones_like(ratio))
        decays = torch.where(adapted, ratio * decay, torch.zeros_like(ratio))
        momenta = self._momenta(params)
        if for_kernels(scale.device, params[0].dtype) and self._by_kernel(params, grads, momenta, scale, decays, group):
            return
        apply = _in_turn if scale.device.type == "cpu" else _together
        apply(params, grads, momenta, scale, decays, group)

    def _by_kernel(
        self, params: list[Tensor], grads: list[Tensor], momenta: list[Tensor], scale: Tensor, decays: Tensor,
        group: dict[str, Any],
    ) -> bool:  # fmt: skip
        """Update all tensors by one kernel if they lie in memory alike; whether they do."""
        from clusterssl.lars_kernel import Update

        if not Update.fits(params, grads, momenta):
            return False
        which = tuple(map(id, params))
        if which not in self._kernels:
            self._kernels[which] = Update(params)
        self._kernels[which](params, grads, momenta, scale, decays, group["momentum"], group["lr"])
        return True

    def _momenta(self, params: list[Tensor]) -> list[Tensor]:
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return [self.state[p]["momentum_buffer"] for p in params]


def _in_turn(
    params: list[Tensor], grads: list[Tensor], momenta: list[Tensor], scale: Tensor, decays: Tensor,
    group: dict[str, Any],
) -> None:  # fmt: skip
    """One tensor after the other, while it is in the processor's cache."""
    for p, g, v, s, d in zip(params, grads, momenta, scale.tolist(), decays.tolist(), strict=True):
        v.mul_(group["momentum"]).add_(g, alpha=s)
        p.add_(v.add_(p, alpha=d) if d else v, alpha=-group["lr"])


def _together(
    params: list[Tensor], grads: list[Tensor], momenta: list[Tensor], scale: Tensor, decays: Tensor,
    group: dict[str, Any],
) -> None:  # fmt: skip
    """Whatever the device: factors never leave it, so that each tensor is scaled by a kernel of its own."""
    updates = torch._foreach_mul(grads, list(scale.unbind()))
    if group["weight_decay"] != 0:
        torch._foreach_add_(updates, torch._foreach_mul(params, list(decays.unbind())))
    torch._foreach_mul_(momenta, group["momentum"])
    torch._foreach_add_(momenta, updates)
    torch._foreach_add_(params, momenta, alpha=-group["lr"])


def build_optimizer(
    params: Iterable[Any],
    name: str,
    lr: float,
    weight_decay: float,
    *,
    momentum: float = 0.9,
    fused: bool = False,
    clip_grad: float = 0.0,
) -> torch.optim.Optimizer:
    """The optimiser called `name`: "lars", "sgd" (no Nesterov) or "adamw" (betas 0.9, 0.999, whatever the momentum).

    With `clip_grad`, the gradient of each parameter tensor is scaled down to that norm before every step; a gradient
    scaler has unscaled it by then.
    """
    optimizer: torch.optim.Optimizer
    if name == "lars":
        optimizer = LARS(params, lr, momentum, weight_decay)
    elif name == "sgd":
        optimizer = torch.optim.SGD(params, lr, momentum, weight_decay=weight_decay, foreach=True)
    elif name == "adamw":
        optimizer = torch.optim.AdamW(params, lr, weight_decay=weight_decay, fused=fused or None)
    else:
        raise ValueError(f"unknown optimiser {name!r}")
    if clip_grad > 0:
        optimizer.register_step_pre_hook(lambda optimizer, *_: _clip_each_(optimizer, clip_grad))
    return optimizer


@torch.no_grad()
def _clip_each_(optimizer: torch.optim.Optimizer, largest: float) -> None:
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if grads:
        norms = torch._foreach_norm(grads)
        scales = [(largest / (norm + 1e-6)).clamp_(max=1) for norm in norms]
        torch._foreach_mul_(grads, scales)


def decay_groups(model: nn.Module, *, no_bias_wd: bool = False, bbone_wd: float | None = None) -> list[dict[str, Any]]:
    """Parameter groups by weight decay: the optimiser's, none, the backbone's; frozen parameters are in none.

    Args:
        model: with a `backbone`.
        no_bias_wd: no decay of biases and of other parameters of one dimension, as those of BatchNorm.
        bbone_wd: decay of what remains in the backbone; as all others when None.
    """
    regular: list[Tensor] = []
    plain: list[Tensor] = []
    backbone: list[Tensor] = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if no_bias_wd and (name.endswith(".bias") or p.ndim == 1):
            plain.append(p)
        elif bbone_wd is not None and "backbone" in name:
            backbone.append(p)
        else:
            regular.append(p)
    groups: list[dict[str, Any]] = [{"params": regular}]
    if no_bias_wd:
        groups.append({"params": plain, "weight_decay": 0.0})
    if bbone_wd is not None:
        groups.append({"params": backbone, "weight_decay": bbone_wd})
    return groups


def warmup_cosine(
    step: int, *, steps_per_epoch: int, epochs: int, warmup_epochs: float, start: float, base: float, final: float
) -> float:
    """Learning rate of one optimiser step (SwAV, appendix A).

    Linear from `start` to `base`, both included, over the warm-up's steps; then half a cosine from `base` towards
    `final`: final + (base - final) / 2 * (1 + cos(pi t / T)), t counted from the end of the warm-up.

    Args:
        step: optimiser step from 0.
        steps_per_epoch: steps of one epoch.
        epochs: of the whole run, warm-up included.
        warmup_epochs: of the linear part; a part of an epoch is rounded to steps.
        start: rate of the first step when there is a warm-up.
        base: highest rate.
        final: rate the cosine ends at.
    """
    warmup = round(steps_per_epoch * warmup_epochs)
    if step < warmup:
        return start + (base - start) * step / (warmup - 1) if warmup > 1 else start
    total = steps_per_epoch * epochs - warmup
    return final + (base - final) / 2 * (1 + math.cos(math.pi * (step - warmup) / max(total, 1)))
