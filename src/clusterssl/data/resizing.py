"""Weights of torch's antialiased uint8 resize along one axis, for many boxes at once, on any device.

torch resizes uint8 in integers: weights rounded to 15 bits, each pass rounded to uint8. The weights here are those
integers to the last bit: the same operations in float64, in the same order.

Suffixes: B boxes, O pixels of the result, K taps.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from clusterssl.data.boxes import Interpolation

_MOST_BITS = 22
_REACH = {"bilinear": 1, "bicubic": 2}


class Taps(NamedTuple):
    """Which pixels of a box make a pixel of the result, and with which weights."""

    first_BO: Tensor
    """int64, first pixel"""
    weights_BOK: Tensor
    """float64 that are whole numbers of 15 bits and sign; zero past the box"""
    bits_B: Tensor
    """int64: the weights of a pixel add up to about 2 ** bits"""


def taps_of(length_B: Tensor, longest: int, out: int, interpolation: Interpolation = "bilinear") -> Taps:
    """Weights from boxes of some lengths to `out` pixels.

    Args:
        length_B: int64, pixels of each box along the axis.
        longest: the largest of them, or more.
        out: O, pixels of each result.
        interpolation: kernel.
    """
    reach, device = _REACH[interpolation], length_B.device
    scale_B1 = length_B.double()[:, None] / out
    stretch_B1 = scale_B1.clamp_min(1)
    centre_BO = scale_B1 * (torch.arange(out, dtype=torch.float64, device=device) + 0.5)
    first_BO = (centre_BO - reach * stretch_B1 + 0.5).clamp_min(0).floor()
    stop_BO = torch.minimum((centre_BO + reach * stretch_B1 + 0.5).floor(), length_B[:, None])
    taps = 2 * math.ceil(reach * max(longest / out, 1)) + 1
    at_BOK = first_BO[..., None] + torch.arange(taps, dtype=torch.float64, device=device)
    weights_BOK = _kernel((at_BOK - centre_BO[..., None] + 0.5) / stretch_B1[..., None], interpolation)
    weights_BOK = weights_BOK * (at_BOK < stop_BO[..., None])
    total_BO = torch.zeros_like(centre_BO)
    for tap in range(taps):  # one after the other, as torch adds them
        total_BO = total_BO + weights_BOK[..., tap]
    weights_BOK = weights_BOK / total_BO[..., None]
    powers = power_of_two(torch.arange(1, _MOST_BITS + 1, device=device))
    bits_B = ((weights_BOK.amax((1, 2))[:, None] * powers + 0.5).floor() < 2**15).sum(1)
    whole_BOK = weights_BOK * power_of_two(bits_B)[:, None, None]
    half_BOK = torch.copysign(torch.full_like(whole_BOK, 0.5), whole_BOK)
    return Taps(first_BO.long(), (whole_BOK + half_BOK).trunc(), bits_B)


def power_of_two(bits: Tensor) -> Tensor:
    """float64 2 ** bits, exact on every device."""
    return torch.bitwise_left_shift(torch.ones_like(bits), bits).double()


def _kernel(x: Tensor, interpolation: Interpolation) -> Tensor:
    x = x.abs()
    if interpolation == "bilinear":
        return (1 - x).clamp_min(0)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2  # Keys' with a = -0.5, as PIL's
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def spread(first_BO: Tensor, weights_BOK: Tensor, length: int) -> Tensor:
    """Weights as matrices [B, O, length] that are zero where a box ends before."""
    taps = weights_BOK.shape[2]
    at_BOK = first_BO[..., None] + torch.arange(taps, device=first_BO.device)
    wide = weights_BOK.new_zeros(*weights_BOK.shape[:2], length + taps)
    return wide.scatter_(2, at_BOK, weights_BOK)[..., :length]
