"""What all networks share: a backbone over crops of several sizes, and cluster ids from its heads.

Legend of suffixes: V crops, B images, N = V * B rows, F features, K clusters.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from clusterssl.errors import UserError


class Network(nn.Module):
    """Base of the networks that the methods train.

    Args:
        backbone: module with attribute feature_dim from images B x 3 x h x w to features B x F.
    """

    net = ""
    """word for this class in checkpoints"""
    published_prefix = "module."
    """before every name in published files"""
    published_backbone = ""
    """before the backbone's names in published files"""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    @property
    def feature_dim(self) -> int:
        """Size F of the backbone's features."""
        return int(self.backbone.feature_dim)  # type: ignore[arg-type]

    def features(self, crops: Sequence[Tensor]) -> Tensor:
        """Backbone features N x F; each maximal run of consecutive crops of one size is one pass of the backbone."""
        runs = [list(run) for _, run in itertools.groupby(crops, key=lambda crop: crop.shape[-2:])]
        return _cat([self.backbone(_cat(run)) for run in runs])

    @contextmanager
    def full_precision(self, rows_NX: Tensor) -> Iterator[Tensor]:
        """The rows in the parameters' type, autocast switched off: losses exponentiate what the heads compute."""
        with torch.autocast(rows_NX.device.type, enabled=False):
            yield rows_NX.to(next(self.parameters()).dtype)

    def scores(self, crops: Sequence[Tensor]) -> list[Tensor]:
        """Scores N x K of every head, at least float32."""
        raise NotImplementedError

    @torch.no_grad()
    def predict(self, images: Tensor, head: int = 0) -> Tensor:
        """Cluster of every image: the largest score of one head, in evaluation mode whatever mode the network is in.

        Args:
            images: floating point B x 3 x h x w, normalised as in training.
            head: which of several heads.

        Returns:
            Cluster ids B, int64.

        Raises:
            UserError: no such head; something else than such images.
        """
        fits = isinstance(images, Tensor) and images.is_floating_point() and images.ndim == 4 and images.shape[1] == 3
        if not fits:
            raise UserError("images: give one floating point tensor B x 3 x height x width, normalised as in training")
        before = {module: module.training for module in self.modules()}
        try:
            scores = self.eval().scores([images])
        finally:
            for module, training in before.items():
                module.training = training
        if not 0 <= head < len(scores):
            have = f"heads 0 to {len(scores) - 1}" if scores else "no head"
            raise UserError(f"head {head}: this network has {have}; choose another head or checkpoint")
        return scores[head].argmax(1)

    def record(self) -> dict[str, Any]:
        """What a checkpoint must say of this network for another process to build it; plain values."""
        return {"net": self.net, "arch": str(self.backbone.arch_name), "stem": str(self.backbone.stem_name)}


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
