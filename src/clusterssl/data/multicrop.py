"""Multi-crop (SwAV, Caron et al. 2020, section 3.3): several crops of several sizes from one decoded image.

Suffixes: N images, V views, P parameters, B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clusterssl.data.boxes import BOX_SLOTS, Interpolation, random_boxes
from clusterssl.data.params import AUGMENT_SLOTS, Strengths, per_view
from clusterssl.errors import UserError
from clusterssl.rng import Stream, uniform


class CropParams(NamedTuple):
    """All random choices for one image."""

    boxes_V4: NDArray[np.int64]
    """top, left, height, width in pixels"""
    params_VP: NDArray[np.float32]
    """columns of `params.Param`"""


@dataclass(frozen=True)
class MultiCrop:
    """What crops to take and how strongly to augment them; one entry per resolution in the first four fields."""

    nmb_crops: tuple[int, ...] = (2,)
    """number of crops of each resolution"""
    size_crops: tuple[int | tuple[int, int], ...] = (224,)
    """side in pixels, or (height, width)"""
    min_scale_crops: tuple[float, ...] = (0.14,)
    """smallest area fraction"""
    max_scale_crops: tuple[float, ...] = (1.0,)
    """largest area fraction"""
    flip_p: float | tuple[float, ...] = 0.5
    """probability of a horizontal flip (probabilities: one number, or one per view)"""
    color_jitter: float | tuple[float, float, float, float] = 0.8
    """strength s of the colour jitter: brightness, contrast, saturation s and hue s / 4; or the four strengths"""
    color_jitter_p: float | tuple[float, ...] = 0.8
    gray_p: float | tuple[float, ...] = 0.2
    blur_p: float | tuple[float, ...] = 0.5
    solarize_p: float | tuple[float, ...] = 0.0
    blur_radius: tuple[float, float] = (0.1, 2.0)
    """smallest and largest radius in pixels of PIL's GaussianBlur"""
    interpolation: Interpolation = "bilinear"
    """of the crops' resizing; or bicubic"""

    def __post_init__(self) -> None:
        lists = ("nmb_crops", "size_crops", "min_scale_crops", "max_scale_crops")
        for name in lists:
            object.__setattr__(self, name, tuple(getattr(self, name)))
        lengths = {name: len(getattr(self, name)) for name in lists}
        if len(set(lengths.values())) != 1 or not self.nmb_crops:
            told = ", ".join(f"--{name} has {n}" for name, n in lengths.items())
            raise UserError(f"crop lists differ in length: {told}; give one entry per resolution in each")
        object.__setattr__(self, "size_crops", tuple(_height_width(size) for size in self.size_crops))
        if min(self.nmb_crops) < 1:
            raise UserError(f"--nmb_crops {_words(self.nmb_crops)}: every entry must be at least 1")
        for low, high in zip(self.min_scale_crops, self.max_scale_crops, strict=True):
            if not 0 < low <= high <= 1:
                raise UserError(f"crop scale {low} to {high}: needs 0 < --min_scale_crops <= --max_scale_crops <= 1")
        _ = self.strengths

    @property
    def num_views(self) -> int:
        """V, crops of one image."""
        return sum(self.nmb_crops)

    @cached_property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width of each of the V views."""
        pairs = zip(self.nmb_crops, self.size_crops, strict=True)
        return tuple(_height_width(size) for count, size in pairs for _ in range(count))

    @cached_property
    def scales(self) -> NDArray[np.float64]:
        """Smallest and largest area fraction of each view."""
        scales = list(zip(self.min_scale_crops, self.max_scale_crops, strict=True))
        return np.repeat(np.asarray(scales, dtype=np.float64), self.nmb_crops, axis=0)

    @cached_property
    def strengths(self) -> Strengths:
        """Augmentation strengths per view, checked."""
        views = self.num_views
        s = self.color_jitter
        b, c, sat, hue = s if isinstance(s, Sequence) else (s, s, s, s / 4)
        return Strengths(
            flip_p=per_view("flip_p", self.flip_p, views),
            jitter_p=per_view("color_jitter_p", self.color_jitter_p, views),
            gray_p=per_view("gray_p", self.gray_p, views),
            blur_p=per_view("blur_p", self.blur_p, views),
            solarize_p=per_view("solarize_p", self.solarize_p, views),
            jitter=(float(b), float(c), float(sat), float(hue)),
            blur_radius=self.blur_radius,
        )

    def draw(self, seed: int, epoch: int, index: int, height: int, width: int) -> CropParams:
        """All random choices for one image of the given size; a pure function of its arguments."""
        u_1VS = self.uniforms(seed, epoch, [index])
        return CropParams(self.boxes(u_1VS, height, width)[0], self.params(u_1VS)[0])

    def uniforms(self, seed: int, epoch: ArrayLike, index: ArrayLike) -> NDArray[np.float64]:
        """Uniform draws for N images, [N, V, BOX_SLOTS + AUGMENT_SLOTS]: the input of `boxes` and `params`."""
        slots = BOX_SLOTS + AUGMENT_SLOTS
        return uniform(seed, Stream.CROPS, epoch, index, self.num_views * slots).reshape(-1, self.num_views, slots)

    def boxes(self, u_NVS: NDArray[np.float64], height: ArrayLike, width: ArrayLike) -> NDArray[np.int64]:
        """Crop boxes [N, V, 4] in images of the given sizes ([N] or one number)."""
        return random_boxes(u_NVS[..., :BOX_SLOTS], height, width, self.scales)

    def params(self, u_NVS: NDArray[np.float64]) -> NDArray[np.float32]:
        """Augmentation parameters [N, V, P]; they do not depend on the size of the images."""
        return self.strengths.draw(u_NVS[..., BOX_SLOTS:])


def _height_width(size: int | Sequence[int]) -> tuple[int, int]:
    pair = tuple(int(x) for x in (size if isinstance(size, Sequence) else (size, size)))
    if len(pair) != 2 or min(pair) < 1:
        raise UserError(f"crop size {size}: give a side, or height and width, of at least 1 pixel")
    return pair[0], pair[1]


def _words(values: Sequence[object]) -> str:
    return " ".join(str(value) for value in values)
