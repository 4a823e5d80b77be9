"""What filters and clusters answer to, first filters as pictures, prototypes beside one another, attention.

Legend of suffixes: B images of a batch, C channels or clusters, E images kept for each, K prototypes, D dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from clusterssl.insight.maps import watched
from clusterssl.models.network import Network
from clusterssl.models.vit import PATCH, Block, ViT


class Best:
    """The highest answers of many channels, taken in batch by batch."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.answers_CE, self.positions_CE = torch.empty(0), torch.empty(0, dtype=torch.int64)

    def see(self, answers_BC: Tensor, index_B: Tensor) -> None:
        """Take in the answers to the images at these dataset positions."""
        answers_CB = answers_BC.float().cpu().T
        positions_CB = index_B.cpu().expand(len(answers_CB), -1)
        if self.answers_CE.numel():
            answers_CB = torch.cat([self.answers_CE, answers_CB], 1)
            positions_CB = torch.cat([self.positions_CE, positions_CB], 1)
        order = answers_CB.sort(dim=1, descending=True, stable=True).indices[:, : self.count]
        self.answers_CE, self.positions_CE = answers_CB.gather(1, order), positions_CB.gather(1, order)


@torch.no_grad()
def best_images(
    network: Network | None, backbone: nn.Module, layers: Iterable[str], batches: Iterable[tuple[Tensor, Tensor]],
    count: int, head: int = 0,
) -> dict[str, Best]:  # fmt: skip
    """For each layer and its filters the images of highest spatial mean after the ReLU; under "clusters" of the head.

    Args:
        network: with heads; None: no clusters.
        backbone: that of the network.
        layers: see `maps.watched`.
        batches: normalised images and their dataset positions.
        count: E.
        head: which of several.
    """
    with ExitStack() as stack:
        maps = {layer: stack.enter_context(watched(backbone, layer)) for layer in layers}
        found = {layer: Best(count) for layer in maps} | ({"clusters": Best(count)} if network else {})
        for images, index in batches:
            if network is None:
                backbone(images)
            else:
                found["clusters"].see(network.scores([images])[head], index)
            for layer, seen in maps.items():
                found[layer].see(seen.cut().mean((2, 3)), index)
    return found


def filter_pictures(weight: NDArray[np.float32]) -> list[NDArray[np.uint8]]:
    """First filters, each stretched to the whole range: uint8 h x w x 3, grey where they see two kinds of edges.

    Args:
        weight: of the first convolution, C x 3 x h x w or C x 2 x h x w.
    """
    shown = []
    for kernel in np.asarray(weight, dtype=np.float64):
        image = kernel.transpose(1, 2, 0) if len(kernel) == 3 else np.repeat(kernel.mean(0)[..., None], 3, axis=2)
        low, high = image.min(), image.max()
        shown.append(np.rint(255 * (image - low) / max(high - low, 1e-12)).astype(np.uint8))
    return shown


def prototype_neighbours(weight_KD: Tensor, count: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The prototypes of highest cosine to each: cosines [K, E] and their numbers."""
    unit_KD = F.normalize(weight_KD.detach().float().cpu(), dim=1)
    cosine_KK = unit_KD @ unit_KD.T
    cosine_KK.fill_diagonal_(-torch.inf)
    best = cosine_KK.topk(min(count, len(unit_KD) - 1), dim=1)
    return best.values.numpy(), best.indices.numpy()


def attention(network: Network, images_B3HW: Tensor, layer: str, head: int = 0) -> Tensor:
    """Where a network looks for the cluster it chooses, float32 B x h x w between 0 and 1.

    A vision transformer says it itself: attention of the class token in the last block, mean over its heads. For all
    others: the layer's map weighted by the mean gradient of the winning score (Grad-CAM, Selvaraju et al. 2017).
    """
    if isinstance(network.backbone, ViT):
        seen_Bhw = _class_token(network.backbone, images_B3HW)
    else:
        with torch.enable_grad(), watched(network.backbone, layer) as seen:
            scores_BK = network.scores([images_B3HW.detach().requires_grad_(True)])[head]
            (gradient_BChw,) = torch.autograd.grad(scores_BK.amax(1).sum(), seen.raw_BChw)
        seen_Bhw = F.relu((gradient_BChw.mean((2, 3), keepdim=True) * seen.cut()).sum(1)).detach()
    low, high = seen_Bhw.amin((1, 2), keepdim=True), seen_Bhw.amax((1, 2), keepdim=True)
    return (seen_Bhw - low) / (high - low).clamp(min=1e-12)


@torch.no_grad()
def _class_token(trunk: ViT, images_B3HW: Tensor) -> Tensor:
    """Attention of the class token to every patch in the last block, mean over heads: B x h x w."""
    attend = cast(Block, trunk.blocks[-1]).attn
    tokens: list[Tensor] = []
    with attend.register_forward_hook(lambda _, inputs, _output: tokens.append(inputs[0])):
        trunk(images_B3HW)
    query, key, _ = attend.qkv(tokens[0]).unflatten(2, (3, attend.heads, -1)).permute(2, 0, 3, 1, 4)
    weight_BHT = (query[:, :, 0:1] @ key.transpose(2, 3) / query.shape[-1] ** 0.5).softmax(-1)[:, :, 0, 1:]
    high, wide = (side // PATCH for side in images_B3HW.shape[-2:])
    return weight_BHT.mean(1).unflatten(1, (high, wide))
