"""What is read off a network for one image: its feature, what its head says, a tiny grey copy of what it saw.

Legend of suffixes: B images, F features, K clusters, P pixels of the grey copy.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clusterssl.config import require, require_numbers
from clusterssl.data import MEAN
from clusterssl.errors import UserError
from clusterssl.evals import inputs
from clusterssl.evals.setup import Embedding
from clusterssl.models.headed import HeadedNet
from clusterssl.models.network import Network
from clusterssl.models.weights import model_from_weights, tell_left_aside

logger = logging.getLogger(__name__)

SIDE = 16
"""of the grey copies, in pixels"""


@dataclass(frozen=True)
class ReadingOptions:
    """What the network says."""

    cls_num: int = 0
    """which of several heads, from 0"""
    temperature: float = 0.0
    """of the softmax that gives confidences; 0: 0.1 where scores are cosines, 1 where they are logits"""
    use_mlp: bool = False
    """features after the projection head, for --k, neighbours, duplicates and outliers; else the backbone's"""
    batch_size: int = 256
    """images of a forward pass"""

    def __post_init__(self) -> None:
        require(self.cls_num >= 0, f"--cls_num {self.cls_num}: heads are numbered from 0")
        require_numbers(self, "temperature", least=0)
        require_numbers(self, "batch_size", least=1)


class Said(NamedTuple):
    """One batch."""

    features_BF: Tensor
    """float32, of unit length"""
    clusters_B4: Tensor
    """float32: cluster, its probability, second best cluster, its probability; no column without a head"""
    grey_BP: Tensor
    """uint8"""


class Reader(nn.Module):
    """A frozen network that is asked for everything at once.

    Args:
        backbone: from images to features.
        network: the same network with its heads; None: it has none.
        head: whose clusters are wanted; None: there is none.
        options: temperature and features.
        std: of the channels, as the network was trained.

    Raises:
        UserError: no projection head to take features after.
    """

    def __init__(
        self, backbone: nn.Module, network: Network | None, head: int | None, options: ReadingOptions,
        std: tuple[float, ...],
    ) -> None:  # fmt: skip
        super().__init__()
        self.network, self.head, self.std = network, head, std
        self.backbone = backbone if network is None else network.backbone
        self.embedding = Embedding(network) if options.use_mlp and network is not None else None
        self.temperature = options.temperature or (1.0 if isinstance(network, HeadedNet) else 0.1)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images_B3HW: Tensor) -> Said:
        """Read a batch of normalised images."""
        grey_BP = self._grey(images_B3HW)
        if self.network is None:
            features_BF = _unit(self.backbone(images_B3HW))
            return Said(features_BF, features_BF.new_empty(len(features_BF), 0), grey_BP)
        seen: list[Tensor] = []
        with self.backbone.register_forward_hook(lambda _module, _inputs, output: seen.append(output)):
            embedded_BD, scores = self.network([images_B3HW])
        features_BF = _unit(seen[0] if self.embedding is None else embedded_BD)
        if self.head is None:
            return Said(features_BF, features_BF.new_empty(len(features_BF), 0), grey_BP)
        scores_BK = scores if isinstance(scores, Tensor) else scores[self.head]
        return Said(features_BF, two_best(scores_BK / self.temperature), grey_BP)

    def _grey(self, images_B3HW: Tensor) -> Tensor:
        grey_B1HW = (images_B3HW * images_B3HW.new_tensor(self.std)[:, None, None]).mean(1, keepdim=True)
        small_B1SS = F.adaptive_avg_pool2d(grey_B1HW, SIDE) + sum(MEAN) / 3
        return (small_B1SS * 255).round().clamp(0, 255).to(torch.uint8).flatten(1)


def two_best(logits_BK: Tensor) -> Tensor:
    """Float32 [B, 4]: most probable cluster, its probability, the second, its probability.

    With one cluster the second is that cluster again, with probability 0.
    """
    chance_B2, cluster_B2 = logits_BK.float().softmax(1).topk(min(2, logits_BK.shape[1]), dim=1)
    if chance_B2.shape[1] == 1:
        chance_B2, cluster_B2 = F.pad(chance_B2, (0, 1)), cluster_B2.expand(-1, 2)
    return torch.stack([cluster_B2.float(), chance_B2], dim=2).flatten(1)


def _unit(rows_BF: Tensor) -> Tensor:
    return F.normalize(rows_BF.float().flatten(1), dim=1)


def open_reader(
    flags: inputs.NetworkOptions, options: ReadingOptions, *, device: torch.device, seed: int
) -> tuple[Reader, inputs.Network]:
    """The network of a checkpoint, with its heads where it has any.

    Args:
        flags: which checkpoint.
        options: see `Reader`.
        device: where it goes.
        seed: of k-means and of whatever else is drawn.

    Raises:
        UserError: see `inputs.open_network` and `Reader`; there is no such head.
    """
    opened = inputs.open_network(flags, data_path="", seed=seed, tell=False)
    network, number = _whole(flags.pretrained, options, opened)
    head = options.cls_num if number else None
    if head is not None and head >= number:
        raise UserError(f"--cls_num {head}: this network has heads 0 to {number - 1}; choose one of them")
    if head is not None:
        logger.info("%s: read with its head, which says the clusters", flags.pretrained)
    elif network is None:
        tell_left_aside(opened.left_aside, flags.pretrained)
    return Reader(opened.backbone, network, head, options, opened.std).to(device), opened


@torch.no_grad()
def _whole(path: str, options: ReadingOptions, opened: inputs.Network) -> tuple[Network | None, int]:
    """The network with its heads and how many give clusters; None where the checkpoint does not tell."""
    try:
        network = model_from_weights(path).eval()
        return network, len(network.scores([torch.zeros(1, 3, *opened.image_size)]))
    except UserError as error:
        if options.use_mlp:
            raise
        logger.info("%s", error)
        return None, 0
