"""Micro-batches give the loss and the gradient of one batch, for a loss that couples all images."""

from __future__ import annotations

import torch
from torch import Tensor

from clusterssl.cluster.whole_step import WholeStepLoss


def coupled(outputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """No sum over images: softmax over the batch, both heads multiplied."""
    first, second = (x.softmax(1) for x in outputs)
    return (first.square().sum() * second[..., :2].log().mean()).sin(), first[:1].detach()


def test_micro_batches_have_the_loss_and_gradient_of_one_batch() -> None:
    torch.manual_seed(0)
    weights = [torch.randn(5, k, dtype=torch.float64, requires_grad=True) for k in (4, 3)]
    x_VBF = torch.randn(2, 12, 5, dtype=torch.float64)
    expected, more = coupled([x_VBF @ w for w in weights])
    gradients = torch.autograd.grad(expected, weights)
    step = WholeStepLoss(coupled)
    assert step.complete
    value, same = step([x_VBF @ w for w in weights])
    assert torch.equal(value, expected) and torch.equal(same, more)
    micro = x_VBF.split([5, 4, 3], dim=1)
    step.plan([[(part @ w).detach() for w in weights] for part in micro])
    found = []
    for number, part in enumerate(micro):
        assert not step.complete
        loss, piece = step([part @ w for w in weights])
        assert torch.equal(loss, expected)
        (loss / len(micro)).backward()
        found.append(piece)
        assert step.complete == (number == 2)
    torch.testing.assert_close(torch.cat(found, dim=1), more)
    for w, gradient in zip(weights, gradients, strict=True):
        torch.testing.assert_close(w.grad, gradient)
