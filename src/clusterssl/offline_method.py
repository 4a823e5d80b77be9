"""What DeepCluster-v2 and SeLa-v2 share: labels once an epoch from a memory of embeddings, learned in between.

Caron et al. 2020, https://arxiv.org/abs/2006.09882, section 5.1 and appendix D.

Shape suffixes: B images, V views, A assigned views, N = V * B rows, M slots of the memory, D feature dimension,
H heads, K prototypes of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from clusterssl.checkpoint import bare
from clusterssl.cluster.memory import MemoryBank
from clusterssl.cluster.offline import OfflineLabels, multi_head_cross_entropy
from clusterssl.config import require
from clusterssl.feed import Feed
from clusterssl.method import Method
from clusterssl.monitor import Observation

_FIRST_PASS = 10**6
"""number of the pass that fills the memory, among the epochs, whose crops it must not share"""


class OfflineMethod(Method):
    """Cross-entropy of all crops with labels that the start of the epoch gave; `assign` says how."""

    frozen_steps: int = 0
    """first steps in which the prototypes do not learn"""

    def __init__(
        self, model: nn.Module, feed: Feed, *, views: int, crops_for_assign: Sequence[int], temperature: float
    ) -> None:
        """Start with an empty memory and without labels.

        Args:
            model: of a `MultiCropNet` with a prototype layer for each head.
            feed: the images.
            views: V.
            crops_for_assign: views that are remembered; heads take turns with them.
            temperature: of the softmax over prototypes in the loss.

        Raises:
            UserError: an epoch has fewer images than a head has prototypes.
        """
        self.model, self.net, self.feed, self.temperature = model, bare(model), feed, temperature
        self.views, self.assigned = views, list(crops_for_assign)
        layers = self.net.prototype_layers()
        images, most = feed.steps_per_epoch * feed.global_batch, max(layer.out_features for layer in layers)
        require(most <= images, f"--nmb_prototypes {most}: there are only {images} images in an epoch to cluster")
        dim = layers[0].in_features
        memory = MemoryBank(len(self.assigned), feed.steps_per_epoch, feed.step_images, dim, feed.device)
        self.labels = OfflineLabels(len(layers), feed.num_images, memory)

    def assign(self, epoch: int, head: int, z_MD: Tensor) -> Tensor:
        """Labels of one head for the embeddings [M, D] in this rank's slots, int64 [M]; a collective call."""
        raise NotImplementedError

    def begin_epoch(self, epoch: int) -> None:
        """Label the images by what the last epoch left in the memory; before the first, one pass fills it."""
        if not self.labels.memory.filled:
            self.model.train()
            self.labels.memory.fill(self.embed, self.feed.augmented(_FIRST_PASS))
        self.labels.renew(partial(self.assign, epoch))

    @torch.no_grad()
    def embed(self, crops: list[Tensor]) -> Tensor:
        """Embeddings [A, B, D] of the assigned crops, each of which is a batch of its own."""
        with self.feed.autocast():
            return torch.stack([self.net([crops[a]])[0] for a in self.assigned])

    def loss(self, crops: list[Tensor], index: Tensor) -> Tensor:
        """Cross-entropy of all crops with the labels of their images; the embeddings replace those in the memory."""
        z_ND, scores_HNK = self.model(crops)
        z_ABD = self.of_assigned(z_ND.detach())
        self.labels.memory.write(z_ABD, index)
        self.seen = Observation(z_ABD.flatten(0, 1), self.of_assigned(scores_HNK[0].detach()).flatten(0, 1), None)
        return self.cross_entropy(scores_HNK, index)

    def cross_entropy(self, scores_HNK: Sequence[Tensor], index: Tensor) -> Tensor:
        """Of all heads, with the labels of the images at these dataset positions."""
        return multi_head_cross_entropy(scores_HNK, self.labels.of(index), self.temperature)

    def before_step(self, step: int) -> None:
        if step < self.frozen_steps:
            for layer in self.net.prototype_layers():
                layer.weight.grad = None

    def of_assigned(self, rows_NX: Tensor) -> Tensor:
        """Rows of the assigned views, [A, B, X]."""
        return torch.stack([rows_NX.unflatten(0, (self.views, -1))[a] for a in self.assigned])

    def state_dict(self) -> dict[str, Any]:
        return self.labels.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.labels.load_state_dict(state)
