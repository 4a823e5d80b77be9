"""Fixed edge filters before a network: the input of DeepCluster's published models (Caron et al. 2018, section 4.1).

Legend of suffixes: B images, H height, W width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clusterssl.errors import UserError


def _edges() -> Tensor:
    """Horizontal and vertical Sobel filters, 2 x 1 x 3 x 3."""
    across = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])
    return torch.stack([across, across.T])[:, None]


class FixedConv2d(nn.Module):
    """Convolution whose weight and bias are in the state dict but never trained."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", torch.zeros(len(weight)))

    def forward(self, x: Tensor) -> Tensor:
        """Cross-correlation that keeps height and width."""
        return F.conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2)


class Sobel(nn.Sequential):
    """Normalised images B x 3 x H x W to horizontal and vertical edges B x 2 x H x W of their grey values."""

    def __init__(self) -> None:
        super().__init__(FixedConv2d(torch.full((1, 3, 1, 1), 1 / 3)), FixedConv2d(_edges()))


def see_edges(backbone: nn.Module, arch: str) -> None:
    """Let the first convolution of any network see edges (`Sobel`) in the place of colours.

    Its weights lose one input channel; no other name or shape of the network changes.

    Raises:
        UserError: the network has no convolution of three input channels.
    """
    first = next((m for m in backbone.modules() if isinstance(m, nn.Conv2d) and m.in_channels == 3), None)
    if first is None or first.groups != 1:
        raise UserError(f"--sobel: {arch} has no first convolution that sees colours; take a convolutional network")
    first.in_channels = 2
    first.weight = nn.Parameter(first.weight.detach()[:, :2].clone())
    first.register_buffer("edge_filter", (_edges() / 3).repeat(1, 3, 1, 1), persistent=False)
    first.register_forward_pre_hook(_edges_of)


def _edges_of(first: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    assert isinstance(first.edge_filter, Tensor)
    return (F.conv2d(inputs[0], first.edge_filter, padding=1),)
