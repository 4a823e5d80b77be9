"""Rows for tests of clustering."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def blobs(n: int, dim: int, centres: int, seed: int = 0, spread: float = 0.3, unit: bool = True) -> Tensor:
    """Rows around random centres, in random order."""
    generator = torch.Generator().manual_seed(seed)
    around = torch.randn(centres, dim, generator=generator)
    x = around[torch.randint(centres, (n,), generator=generator)] + spread * torch.randn(n, dim, generator=generator)
    return F.normalize(x, dim=1) if unit else x
