"""Vision transformers of Self-Classifier, with their parameter names (Dosovitskiy et al. 2021; Touvron et al. 2021).

Legend of suffixes: B images, H height, W width, T tokens (class token and patches), D width, P patches a side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH = 16
"""pixels a side"""
_SIDE = 14  # patches a side of the position embedding: images of 224 pixels


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Tokens B x T x D to tokens B x T x D."""
        q, k, v = self.qkv(x_BTD).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with GELU between them, four times as wide inside."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Tokens B x T x D to tokens B x T x D."""
        return self.fc2(F.gelu(self.fc1(x_BTD)))


class Block(nn.Module):
    """Attention and MLP, each on normalised tokens and added to them."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Tokens B x T x D to tokens B x T x D."""
        x_BTD = x_BTD + self.attn(self.norm1(x_BTD))
        return x_BTD + self.mlp(self.norm2(x_BTD))


class PatchEmbed(nn.Module):
    """One token for each patch of 16 x 16 pixels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, PATCH, stride=PATCH)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Images B x 3 x H x W to tokens B x (H/16 W/16) x D."""
        return self.proj(x_BCHW).flatten(2).transpose(1, 2)


class ViT(nn.Module):
    """Twelve blocks; the feature is the class token. Images of any size of at least 16 x 16 pixels.

    Args:
        dim: width D.
        heads: of the attention.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.feature_dim = dim
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, _SIDE**2 + 1, dim))
        self.patch_embed = PatchEmbed(dim)
        self.blocks = nn.ModuleList([Block(dim, heads) for _ in range(12)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Features B x D of images B x 3 x H x W."""
        high, wide = (side // PATCH for side in x_BCHW.shape[-2:])
        x_BTD = self.patch_embed(x_BCHW)
        x_BTD = torch.cat([self.cls_token.expand(len(x_BTD), -1, -1), x_BTD], dim=1)
        x_BTD = x_BTD + self.positions(high, wide)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.norm(x_BTD)[:, 0]

    def positions(self, high: int, wide: int) -> Tensor:
        """Position embedding 1 x (1 + high * wide) x D, resized bicubically where the image is not 14 x 14 patches."""
        if high == wide == _SIDE:
            return self.pos_embed
        map_1DPP = self.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (_SIDE, _SIDE))
        # A tenth of a patch more keeps the size from being rounded down; it also sets the published sampling points.
        factors = ((high + 0.1) / _SIDE, (wide + 0.1) / _SIDE)
        map_1DPP = F.interpolate(map_1DPP, scale_factor=factors, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], map_1DPP.flatten(2).transpose(1, 2)], dim=1)
