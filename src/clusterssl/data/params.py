"""Augmentation parameters: which column holds what, and how they are drawn.

They are drawn on the CPU together with the crop boxes and travel with the batch; the training device only applies
them (augment.py). Distributions as in SwAV (Caron et al. 2020, appendix A; pytorch implementation): flip 0.5, colour
jitter with probability 0.8 in random order, grey 0.2, Gaussian blur 0.5 with radius uniform in [0.1, 2].

Suffixes: N images, V views, S slots, P parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from clusterssl.errors import UserError


class Param(IntEnum):
    """Columns of the parameter tensor."""

    FLIP = 0  # 1: mirror left and right
    JITTER = 1  # 1: apply the four colour operations
    ORDER = 2  # row of JITTER_ORDERS
    BRIGHTNESS = 3  # factors; 1 leaves the image as it is
    CONTRAST = 4
    SATURATION = 5
    HUE = 6  # shift as a fraction of the colour circle; 0 leaves the image as it is
    GRAY = 7  # 1: three equal grey channels
    SIGMA = 8  # radius of PIL's GaussianBlur in pixels; 0: no blur
    SOLARIZE = 9  # 1: invert pixels of half brightness and more


NUM_PARAMS = len(Param)
JITTER_ORDERS = np.array(list(permutations(range(4))), dtype=np.int64)
"""All orders of (0 brightness, 1 contrast, 2 saturation, 3 hue), [24, 4]."""

_SLOTS = ("flip", "jitter", "order", "brightness", "contrast", "saturation", "hue", "gray", "blur", "sigma", "solarize")
AUGMENT_SLOTS = len(_SLOTS)


def per_view(name: str, value: float | Sequence[float], views: int) -> NDArray[np.float64]:
    """One number for all views, or one per view -> float64 [V]."""
    values = np.asarray(value, dtype=np.float64).reshape(-1)
    if len(values) not in (1, views):
        raise UserError(f"{name} has {len(values)} values for {views} views: give one value, or one per view")
    return np.broadcast_to(values, (views,))


@dataclass(frozen=True)
class Strengths:
    """Probabilities [V] and ranges of the augmentation, checked."""

    flip_p: NDArray[np.float64]
    jitter_p: NDArray[np.float64]
    gray_p: NDArray[np.float64]
    blur_p: NDArray[np.float64]
    solarize_p: NDArray[np.float64]
    jitter: tuple[float, float, float, float]  # brightness, contrast, saturation, hue
    blur_radius: tuple[float, float]

    def __post_init__(self) -> None:
        for name in ("flip_p", "jitter_p", "gray_p", "blur_p", "solarize_p"):
            values = getattr(self, name)
            if not np.all((values >= 0) & (values <= 1)):
                raise UserError(f"{name} is {values.tolist()}: probabilities lie in 0..1")
        if min(self.jitter) < 0 or self.jitter[3] > 0.5:
            raise UserError(f"color_jitter gives strengths {self.jitter}: none may be negative, the hue's at most 0.5")
        if not 0 < self.blur_radius[0] <= self.blur_radius[1]:
            raise UserError(f"blur_radius is {self.blur_radius}: needs 0 < smallest <= largest")

    def draw(self, u_NVS: NDArray[np.float64]) -> NDArray[np.float32]:
        """Turns uniform draws [N, V, AUGMENT_SLOTS] into parameters, float32 [N, V, P]."""
        u = {name: u_NVS[..., i] for i, name in enumerate(_SLOTS)}
        out = np.zeros((*u_NVS.shape[:2], NUM_PARAMS), dtype=np.float32)
        jitter = u["jitter"] < self.jitter_p
        out[..., Param.FLIP] = u["flip"] < self.flip_p
        out[..., Param.JITTER] = jitter
        out[..., Param.ORDER] = np.floor(u["order"] * len(JITTER_ORDERS))
        names = (("brightness", Param.BRIGHTNESS), ("contrast", Param.CONTRAST), ("saturation", Param.SATURATION))
        for (name, column), strength in zip(names, self.jitter[:3], strict=True):
            low = max(0.0, 1.0 - strength)
            out[..., column] = np.where(jitter, low + (1.0 + strength - low) * u[name], 1.0)
        out[..., Param.HUE] = np.where(jitter, self.jitter[3] * (2.0 * u["hue"] - 1.0), 0.0)
        out[..., Param.GRAY] = u["gray"] < self.gray_p
        low, high = self.blur_radius
        out[..., Param.SIGMA] = np.where(u["blur"] < self.blur_p, low + (high - low) * u["sigma"], 0.0)
        out[..., Param.SOLARIZE] = u["solarize"] < self.solarize_p
        return out
