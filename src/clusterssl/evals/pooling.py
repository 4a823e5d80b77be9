"""From feature maps to the vectors of instance retrieval: average, GeM and R-MAC pooling, PCA with whitening.

Suffixes: R vectors of an image, F features, P principal components, h w map height and width.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from clusterssl import dist
from clusterssl.errors import UserError

Pooling = Literal["rmac", "gem", "avg"]
Region = tuple[int, int, int, int]
"""left, top, width, height"""

_OVERLAP = 0.4
_SMALLEST = 1e-5


def rmac_regions(height: int, width: int, levels: int) -> list[Region]:
    """Squares of several sizes that cover a map (Tolias et al. 2016, section 3.2), as DeepCluster cuts them.

    Args:
        height, width: of the map.
        levels: L; at level l the side is about 2 min(height, width) / (l + 1).
    """
    side, longer = min(height, width), max(height, width)
    steps = torch.arange(2, 8, dtype=torch.float64)
    stride = (longer - side) / (steps - 1)
    overlap = (side**2 - side * stride) / side**2
    extra = int((overlap - _OVERLAP).abs().argmin()) + 1 if longer > side else 0
    regions: list[Region] = []
    for level in range(1, levels + 1):
        size = max(1, math.floor(2 * side / (level + 1)))
        across = _starts(width, size, level + (extra if width > height else 0))
        down = _starts(height, size, level + (extra if height > width else 0))
        regions += [(left, top, size, size) for top in down for left in across]
    return [_inside(region, height, width) for region in regions]


def _starts(side: int, size: int, count: int) -> list[int]:
    half = math.floor(size / 2 - 1)
    stride = (side - size) / (count - 1) if count > 1 else 0.0
    return [math.floor(half + stride * k) - half for k in range(count)]


def _inside(region: Region, height: int, width: int) -> Region:
    left, top, wide, high = region
    return max(0, min(left, width - wide)), max(0, min(top, height - high)), wide, high


def pooled(map_Fhw: Tensor, how: Pooling, *, levels: int = 3, p: float = 3.0) -> Tensor:
    """Vectors of unit length of one image: one for each region (rmac), or one (gem, avg).

    Args:
        map_Fhw: feature map.
        how: rmac: largest value over each region; gem: p-th root of the mean p-th power (Radenovic et al. 2019,
            equation 3); avg: mean.
        levels: of rmac.
        p: of gem.

    Returns:
        R x F.
    """
    if how == "rmac":
        regions = rmac_regions(map_Fhw.shape[1], map_Fhw.shape[2], levels)
        vectors_RF = torch.stack([map_Fhw[:, y : y + h, x : x + w].amax((1, 2)) for x, y, w, h in regions])
    elif how == "gem":
        vectors_RF = map_Fhw.clamp(min=1e-6).pow(p).mean((1, 2)).pow(1 / p)[None]
    else:
        vectors_RF = map_Fhw.mean((1, 2))[None]
    return F.normalize(vectors_RF, dim=1)


class Moments:
    """Sums over many vectors from which mean and covariance follow; float64, of all ranks once `whitening` is asked."""

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        self._sums = torch.zeros(features + 1, features + 1, dtype=torch.float64, device=device)

    def add(self, vectors_RF: Tensor) -> None:
        """Count some vectors."""
        rows = F.pad(vectors_RF.to(self._sums.device, torch.float64), (0, 1), value=1.0)
        self._sums.addmm_(rows.T, rows)

    def whitening(self, components: int) -> tuple[Tensor, Tensor]:
        """Mean [F] and projection F x P onto the principal components, each divided by the root of its eigenvalue.

        A collective. Eigenvalues are those of the centred vectors' X^T X, raised to 1e-5 of the largest, as published.

        Raises:
            UserError: more components than features, or too few vectors.
        """
        sums = dist.all_reduce_(self._sums.clone())
        features, count = len(sums) - 1, float(sums[-1, -1])
        if components > features or components >= count:
            raise UserError(
                f"--n_pca {components}: {count:.0f} vectors of {features} numbers do not give as many; lower it"
            )
        mean_F = sums[-1, :-1] / count
        values, axes_FF = torch.linalg.eigh(sums[:-1, :-1] - count * torch.outer(mean_F, mean_F))
        values = values.clamp(min=_SMALLEST * float(values.max()))
        projection_FP = (axes_FF / values.sqrt()).flip(1)[:, :components]
        return mean_F, dist.broadcast_(projection_FP.contiguous())


def described(vectors_RF: Tensor, whitening: tuple[Tensor, Tensor] | None) -> Tensor:
    """One descriptor of unit length: the sum of an image's vectors, each whitened and of unit length before.

    Args:
        vectors_RF: of unit length.
        whitening: mean and projection; None leaves the vectors as they are.
    """
    if whitening is not None:
        mean_F, projection_FP = whitening
        vectors_RF = F.normalize((vectors_RF.double() - mean_F) @ projection_FP, dim=1)
    return F.normalize(vectors_RF.double().sum(0), dim=0)
