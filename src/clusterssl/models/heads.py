"""Projection head and prototype layers with the published parameter names.

Legend of suffixes: N rows, D embedding size, K prototypes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def projection_head(in_dim: int, hidden: int, out_dim: int, batch_norm: bool = True) -> nn.Module:
    """Projection head of SwAV (Caron et al. 2020, appendix A).

    Args:
        in_dim: features of the backbone.
        hidden: width of the hidden layer; 0 makes the head a single Linear.
        out_dim: size of the embedding; 0 makes the head the identity.
        batch_norm: whether the hidden layer is normalised; the published w5 model goes without.

    Returns:
        Module from N x in_dim to N x out_dim.
    """
    if out_dim == 0:
        return nn.Identity()
    if hidden == 0:
        return nn.Linear(in_dim, out_dim)
    norm = [nn.BatchNorm1d(hidden)] if batch_norm else []
    return nn.Sequential(nn.Linear(in_dim, hidden), *norm, nn.ReLU(inplace=True), nn.Linear(hidden, out_dim))


class MultiPrototypes(nn.Module):
    """Several prototype layers over one embedding (DeepCluster-v2), named prototypes0, prototypes1, ...

    Args:
        dim: size of the embedding.
        nmb_prototypes: number of prototypes of each layer.
    """

    def __init__(self, dim: int, nmb_prototypes: Sequence[int]) -> None:
        super().__init__()
        self.nmb_heads = len(nmb_prototypes)
        for i, number in enumerate(nmb_prototypes):
            self.add_module(f"prototypes{i}", nn.Linear(dim, number, bias=False))

    def __len__(self) -> int:
        return self.nmb_heads

    def __getitem__(self, i: int) -> nn.Linear:
        layer = getattr(self, f"prototypes{i}")
        assert isinstance(layer, nn.Linear)
        return layer

    def __iter__(self) -> Iterator[nn.Linear]:
        return (self[i] for i in range(len(self)))

    def forward(self, z_ND: Tensor) -> list[Tensor]:
        """Scores N x K of each layer."""
        return [layer(z_ND) for layer in self]


def prototypes(dim: int, nmb_prototypes: int | Sequence[int]) -> nn.Linear | MultiPrototypes:
    """One prototype layer without bias, or one per entry of a list; 0 makes an empty list of layers."""
    if not isinstance(nmb_prototypes, int):
        return MultiPrototypes(dim, nmb_prototypes)
    return nn.Linear(dim, nmb_prototypes, bias=False) if nmb_prototypes else MultiPrototypes(dim, ())


@torch.no_grad()
def normalize_rows_(layer: nn.Linear) -> None:
    """Scale every prototype to unit length, in place."""
    layer.weight.copy_(F.normalize(layer.weight, dim=1))
