"""Small checkpoints for tests of the evaluation scripts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from clusterssl.data import eval_batches, open_source
from clusterssl.evals.features import calibrate_batchnorm
from clusterssl.models.build import build_model
from clusterssl.models.headed import build_headed
from clusterssl.models.network import Network
from clusterssl.models.weights import published_state_dict


class Scoring(nn.Module):
    """A whole network as a module that takes a batch of images, for `calibrate_batchnorm`."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.network.scores([images])


def own_checkpoint(path: Path, *, arch: str = "conv4w8", side: int = 32, heads: tuple[int, ...] = ()) -> Path:
    """A checkpoint as our runs write it, with SwAV's heads, or with DeepCluster's of some sizes.

    The weights are random; BatchNorm is set on digits, so that images differ for all layers and heads.
    """
    torch.manual_seed(0)
    model: Network = build_headed(arch, "small", heads) if heads else build_model(arch, "small", 16, 8, 12)
    digits = eval_batches(open_source("digits", split="train"), np.arange(200), image_size=side, batch_size=100)
    calibrate_batchnorm(Scoring(model), (batch.images for batch in digits))
    meta = {"size_crops": [[side, side]], **model.record()}
    torch.save({"epoch": 1, "state_dict": published_state_dict(model), "model": meta}, path)
    return path
