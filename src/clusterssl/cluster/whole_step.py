"""A loss over all images of a step that is made of micro-batches, exactly as if they were one batch.

Gao et al. 2021 (GradCache), https://arxiv.org/abs/2101.06983: a first pass without gradient gives the outputs of all
micro-batches, the loss and its gradient with respect to them; a second pass sends each micro-batch's share of that
gradient through the network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Objective = Callable[[list[Tensor]], tuple[Tensor, Tensor]]
"""from outputs [V, B, K] of each head to a scalar and to something without gradient [V', B, K'], with B in common"""


class WholeStepLoss:
    """An objective over the images of one step, in one batch or in micro-batches."""

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._planned: list[tuple[Tensor, Tensor, list[Tensor]]] = []
        self._count = 1

    @property
    def complete(self) -> bool:
        """Whether no micro-batch of the step is to come any more."""
        return not self._planned

    def plan(self, outputs: Sequence[list[Tensor]]) -> None:
        """Compute the loss of a whole step and what it wants of the outputs [V, B, K] of each micro-batch and head."""
        sizes = [part[0].shape[1] for part in outputs]
        whole = [torch.cat(head, dim=1).requires_grad_() for head in zip(*outputs, strict=True)]
        loss, more = self._objective(whole)
        gradients = [g_VNK.split(sizes, dim=1) for g_VNK in torch.autograd.grad(loss, whole)]
        parts = zip(more.split(sizes, dim=1), *gradients, strict=True)
        self._planned = [(loss.detach(), part, list(gradient)) for part, *gradient in parts]
        self._count = len(sizes)

    def __call__(self, outputs: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The objective of one batch, or of the next planned micro-batch.

        For a micro-batch: the step's loss as value, with a gradient whose mean over the micro-batches is the step's.
        """
        if self.complete:
            return self._objective(outputs)
        loss, more, gradients = self._planned.pop(0)
        share = torch.stack([(x_VBK * g).sum() for x_VBK, g in zip(outputs, gradients, strict=True)]).sum()
        return loss + self._count * (share - share.detach()), more
