"""Backbone under linear classification heads: DeepCluster (one head), SeLa (several).

Legend of suffixes: V crops, B images, N = V * B rows, F features, K clusters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clusterssl.errors import UserError
from clusterssl.models.build import build_backbone
from clusterssl.models.network import Network


class HeadedNet(Network):
    """Linear heads over the backbone's features (Caron et al. 2018, section 3; Asano et al. 2020, section 3.3).

    Parameters of the heads are `top_layer` when there is one, `top_layer0`, `top_layer1`, ... when there are several.
    A state dict whose heads have other sizes re-creates them when it is loaded.

    Args:
        backbone: module with attribute feature_dim from images to features.
        nmb_clusters: K of every head; empty for none.
        relu_before_heads: the heads see relu(features): DeepCluster clusters what the last ReLU has not yet cut.
        head_std: standard deviation of new weights, biases 0 (DeepCluster: 0.01); 0: the framework's default.

    Raises:
        UserError: a head without clusters.
    """

    net = "headed"
    published_prefix = ""

    def __init__(
        self,
        backbone: nn.Module,
        nmb_clusters: Sequence[int],
        *,
        relu_before_heads: bool = False,
        head_std: float = 0.0,
    ) -> None:
        super().__init__(backbone)
        self.relu_before_heads = relu_before_heads
        self.head_std = head_std
        self.nmb_clusters: tuple[int, ...] = ()
        self.set_heads(nmb_clusters)
        self.register_load_state_dict_pre_hook(_fit_heads)

    def heads(self) -> list[nn.Linear]:
        """The heads, none, one or several."""
        return [getattr(self, name) for name in _names(len(self.nmb_clusters))]

    def set_heads(self, nmb_clusters: Sequence[int], generator: torch.Generator | None = None) -> None:
        """New heads with new random weights. Where their number stays, the parameters are the same objects.

        Args:
            nmb_clusters: K of every head.
            generator: of the weights, on the CPU, so that they do not depend on the device; torch's own when None.

        Raises:
            UserError: a head without clusters.
        """
        sizes = tuple(nmb_clusters)
        if min(sizes, default=1) < 1:
            raise UserError(f"--nmb_clusters {' '.join(map(str, sizes))}: every head needs at least 1 cluster")
        if len(sizes) != len(self.nmb_clusters):
            for name in _names(len(self.nmb_clusters)):
                delattr(self, name)
            like = next(self.backbone.parameters(), torch.empty(0))
            for name, size in zip(_names(len(sizes)), sizes, strict=True):
                head = nn.Linear(self.feature_dim, size, device="meta")  # draws nothing; `_reset` does
                for kind, parameter in list(head.named_parameters()):
                    empty = torch.empty(parameter.shape, device=like.device, dtype=like.dtype)
                    head.register_parameter(kind, nn.Parameter(empty))
                self.add_module(name, head)
        self.nmb_clusters = sizes
        for head, size in zip(self.heads(), sizes, strict=True):
            self._resize(head, size)
            self._reset(head, generator)

    def _resize(self, head: nn.Linear, size: int) -> None:
        """Give the same parameters another size, so that an optimiser goes on with them."""
        if head.out_features != size:
            head.out_features = size
            head.weight.grad = head.bias.grad = None
            head.weight.data = head.weight.data.new_empty(size, self.feature_dim)
            head.bias.data = head.bias.data.new_empty(size)

    @torch.no_grad()
    def _reset(self, head: nn.Linear, generator: torch.Generator | None) -> None:
        for parameter in (head.weight, head.bias):
            drawn = torch.zeros(parameter.shape, dtype=torch.float32, device="cpu")
            if not self.head_std:
                drawn.uniform_(-(self.feature_dim**-0.5), self.feature_dim**-0.5, generator=generator)
            elif parameter is head.weight:
                drawn.normal_(0, self.head_std, generator=generator)
            parameter.copy_(drawn)

    def empty_heads(self, nmb_clusters: Sequence[int]) -> dict[str, Tensor]:
        """Names and shapes that heads of these sizes have in a state dict, as tensors without memory."""
        empty = {}
        for name, size in zip(_names(len(nmb_clusters)), nmb_clusters, strict=True):
            empty[f"{name}.weight"] = torch.empty(size, self.feature_dim, device="meta")
            empty[f"{name}.bias"] = torch.empty(size, device="meta")
        return empty

    def logits(self, features_NF: Tensor) -> list[Tensor]:
        """Logits N x K of each head, at least float32, from what `features` gave."""
        with self.full_precision(features_NF) as x_NF:
            x_NF = F.relu(x_NF) if self.relu_before_heads else x_NF
            return [head(x_NF) for head in self.heads()]

    def forward(self, crops: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Features and logits of all crops.

        Args:
            crops: V tensors B x 3 x h x w.

        Returns:
            features_NF before the ReLU of `relu_before_heads`, and logits_NK of each head, at least float32;
            row v * B + b belongs to crop v of image b.
        """
        features_NF = self.features(crops)
        return features_NF, self.logits(features_NF)

    def scores(self, crops: Sequence[Tensor]) -> list[Tensor]:
        """Logits N x K of every head."""
        return self.forward(crops)[1]

    def record(self) -> dict[str, Any]:
        """See `Network.record`."""
        options = {"nmb_clusters": list(self.nmb_clusters), "relu_before_heads": self.relu_before_heads}
        return {**super().record(), **options, "head_std": self.head_std}


def build_headed(
    arch: str, stem: str, nmb_clusters: Sequence[int], relu_before_heads: bool = False, head_std: float = 0.0
) -> HeadedNet:
    """Network by the name of its backbone, see `build_backbone`, with heads as in `HeadedNet`.

    Raises:
        UserError: unknown architecture or a head without clusters.
    """
    backbone = build_backbone(arch, stem)
    return HeadedNet(backbone, nmb_clusters, relu_before_heads=relu_before_heads, head_std=head_std)


def head_sizes(state: Mapping[str, Tensor], prefix: str = "") -> tuple[int, ...]:
    """K of every head in a state dict, () when it has none."""
    found = [re.fullmatch(re.escape(prefix) + r"top_layer(\d*)\.weight", name) for name in state]
    names = sorted((match for match in found if match), key=lambda match: int(match[1] or 0))
    return tuple(len(state[match[0]]) for match in names)


def _names(number: int) -> list[str]:
    return ["top_layer"] if number == 1 else [f"top_layer{i}" for i in range(number)]


def _fit_heads(net: nn.Module, state: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    sizes = head_sizes(state, prefix)
    if isinstance(net, HeadedNet) and sizes and sizes != net.nmb_clusters:
        net.set_heads(sizes)
