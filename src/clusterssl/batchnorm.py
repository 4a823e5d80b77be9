"""BatchNorm over the images of several ranks: torch's own on GPUs, the same arithmetic with gloo on CPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from clusterssl import dist


@contextmanager
def unchanged_statistics(model: nn.Module) -> Iterator[None]:
    """Undo what forward passes inside the block do to running statistics."""
    before = [buffer.clone() for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, old in zip(model.buffers(), before, strict=True):
            buffer.copy_(old)


def synchronise(model: nn.Module, mode: str, group_size: int, device: torch.device) -> nn.Module:
    """Replace BatchNorm layers by ones that share their statistics.

    Args:
        model: changed in place where possible; use what is returned.
        mode: SwAV's `--sync_bn`: "pytorch" over all ranks, "apex" in groups of `group_size` consecutive ranks; any
            other word leaves each rank to itself.
        group_size: `--syncbn_process_group_size`.
        device: where the model lives; torch's SyncBatchNorm needs a GPU.

    Raises:
        UserError: the number of processes is not a multiple of `group_size`.
    """
    if dist.size() == 1 or mode not in ("pytorch", "apex"):
        return model
    group = dist.subgroup(group_size) if mode == "apex" else None
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model, group)
    return _convert(model, group)


def shared_by_all(module: nn.Module) -> bool:
    """Whether a layer's statistics are those of all ranks' images."""
    if isinstance(module, CPUSyncBatchNorm):
        return module.group is None
    return isinstance(module, nn.SyncBatchNorm) and module.process_group is None


def same_on_all_ranks(model: nn.Module, shared: Callable[[nn.Module], bool] = shared_by_all) -> bool:
    """Whether ranks that began with the same buffers keep them so by themselves: all belong to layers that share."""
    found = {id(buffer) for module in model.modules() if shared(module) for buffer in module.buffers(recurse=False)}
    return all(id(buffer) in found for buffer in model.buffers())


def _convert(module: nn.Module, group: Any) -> nn.Module:
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return CPUSyncBatchNorm(module, group)
    for name, child in module.named_children():
        setattr(module, name, _convert(child, group))
    return module


class CPUSyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm whose training statistics are those of all ranks of a group; takes over another layer's parameters."""

    def __init__(self, layer: nn.modules.batchnorm._BatchNorm, group: Any) -> None:
        """Share weight, bias and running statistics with `layer`; `group` None means all ranks."""
        super().__init__(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
        self.weight, self.bias = layer.weight, layer.bias
        self.running_mean, self.running_var = layer.running_mean, layer.running_var
        self.num_batches_tracked = layer.num_batches_tracked
        self.group = group

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, got {x.dim()}")

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [B, C, ...] as BatchNorm does, with statistics of the group in training mode."""
        if not self.training:
            return super().forward(x)
        over = [axis for axis in range(x.dim()) if axis != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        count = x.new_tensor([x.numel() / x.shape[1]])
        packed = dist.all_reduce_sum(torch.cat([x.sum(over), count]), self.group)
        total = packed[-1]
        mean_C = packed[:-1] / total
        centred = x - mean_C.view(shape)
        var_C = dist.all_reduce_sum(centred.square().sum(over), self.group) / total
        self._track(mean_C.detach(), var_C.detach() * total.detach() / (total.detach() - 1).clamp_(min=1))
        scaled = centred * torch.rsqrt(var_C + self.eps).view(shape)
        return scaled * self.weight.view(shape) + self.bias.view(shape) if self.affine else scaled

    def _track(self, mean_C: Tensor, var_C: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        factor = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean_C, factor)
        self.running_var.lerp_(var_C, factor)
