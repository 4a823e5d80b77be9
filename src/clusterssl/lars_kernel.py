"""The update of LARS as one GPU kernel over all tensors of a group, whose factors never leave the device.

A program takes a part of one tensor; where tensors begin stands in a table of addresses, as in other multi-tensor
kernels. Triton's interpreter runs the same code on a CPU.

Shape suffixes: T tensors, C parts of tensors.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_PART = 2**11


@triton.jit
def _update(  # type: ignore[no-untyped-def]  # Triton reads annotations as types of its own
    address_T3, size_T, scale_T, decay_T, tensor_C, start_C, momentum, lr, PART: tl.constexpr
):
    c = tl.program_id(0)
    t = tl.load(tensor_C + c)
    i = tl.load(start_C + c) + tl.arange(0, PART)
    inside = i < tl.load(size_T + t)
    p_at = tl.load(address_T3 + 3 * t).to(tl.pointer_type(tl.float32)) + i
    g_at = tl.load(address_T3 + 3 * t + 1).to(tl.pointer_type(tl.float32)) + i
    v_at = tl.load(address_T3 + 3 * t + 2).to(tl.pointer_type(tl.float32)) + i
    p = tl.load(p_at, inside, 0.0)
    step = tl.load(g_at, inside, 0.0) * tl.load(scale_T + t) + p * tl.load(decay_T + t)
    v = tl.load(v_at, inside, 0.0) * momentum + step
    tl.store(v_at, v, inside)
    tl.store(p_at, p - lr * v, inside)


class Update:
    """v <- momentum v + scale g + decay p; p <- p - lr v, for all tensors of a group."""

    def __init__(self, params: list[Tensor]) -> None:
        """Lay out the parts; for the same parameters at every call."""
        self.device = params[0].device
        sizes = [p.numel() for p in params]
        parts = [(t, start) for t, size in enumerate(sizes) for start in range(0, size, _PART)]
        self.size_T = self._there(sizes)
        self.tensor_C, self.start_C = (self._there(column) for column in zip(*parts, strict=True))
        self._known: list[int] = []
        self._address_T3 = self.size_T

    def _there(self, numbers: Sequence[int]) -> Tensor:
        """int64 on the device, without waiting for it."""
        here = torch.tensor(numbers, dtype=torch.int64)
        return here.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else here

    @staticmethod
    def fits(params: list[Tensor], grads: list[Tensor], momenta: list[Tensor]) -> bool:
        """Whether tensors that belong together lie in memory alike, without gaps, in float32."""
        return all(
            p.dtype == g.dtype == v.dtype == torch.float32
            and p.stride() == g.stride() == v.stride()
            and (p.is_contiguous() or (p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last)))
            for p, g, v in zip(params, grads, momenta, strict=True)
        )

    def __call__(
        self, params: list[Tensor], grads: list[Tensor], momenta: list[Tensor], scale_T: Tensor, decay_T: Tensor,
        momentum: float, lr: float,
    ) -> None:  # fmt: skip
        """In place; factors are float32 [T] on the device."""
        addresses = [x.data_ptr() for three in zip(params, grads, momenta, strict=True) for x in three]
        if addresses != self._known:
            self._known, self._address_T3 = addresses, self._there(addresses)
        _update[(len(self.tensor_C),)](
            self._address_T3, self.size_T, scale_T, decay_T, self.tensor_C, self.start_C, momentum, lr, _PART,
            num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
