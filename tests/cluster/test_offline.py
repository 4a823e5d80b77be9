from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clusterssl.cluster.memory import IGNORED, MemoryBank
from clusterssl.cluster.offline import OfflineLabels, multi_head_cross_entropy
from clusterssl.errors import UserError
from tests.ranks import run_ranks

CPU = torch.device("cpu")


def filled(heads: int, images: int = 12) -> OfflineLabels:
    """Two crops, two steps of four images: positions 0, 1, 4, 5, ... are in the memory."""
    labels = OfflineLabels(heads, images, MemoryBank(2, 2, 4, 3, CPU))
    index = torch.tensor([0, 1, 4, 5, 8, 9, 2, 3])
    z = torch.arange(2 * 8 * 3.0).view(2, 8, 3)
    labels.memory.fill(lambda crops: crops[0], [([z[:, :4]], index[:4]), ([z[:, 4:]], index[4:])])
    return labels


def first_number(head: int, z_MD: Tensor) -> Tensor:
    return z_MD[:, 0].long() + 100 * head


def test_head_h_sees_crop_h_modulo_the_crops() -> None:
    labels = filled(3)
    assert (labels.of(torch.arange(12)) == IGNORED).all()
    labels.renew(first_number)
    expected = torch.tensor([[0, 3, 18, 21, 6, 9, IGNORED, IGNORED, 12, 15, IGNORED, IGNORED]]).repeat(3, 1)
    expected[1][expected[1] != IGNORED] += 100 + 24  # the second crop's rows follow the 8 rows of the first
    expected[2][expected[2] != IGNORED] += 200
    assert torch.equal(labels.of(torch.arange(12)), expected)
    assert labels.of(torch.tensor([9, 2])).dtype == torch.int64


def test_state_brings_back_table_and_memory() -> None:
    labels, other = filled(2), OfflineLabels(2, 12, MemoryBank(2, 2, 4, 3, CPU))
    labels.renew(first_number)
    other.load_state_dict(labels.state_dict())
    assert other.memory.filled and torch.equal(other.table_HN, labels.table_HN)
    assert torch.equal(other.memory.embeddings_AMD, labels.memory.embeddings_AMD)


def test_refuses_labels_of_another_dataset() -> None:
    with pytest.raises(UserError, match=r"labels of \(2, 12\) heads and images, these flags make \(3, 12\)"):
        filled(3).load_state_dict(filled(2).state_dict())


def problem(heads: int = 2, ignored: int = 2) -> tuple[list[Tensor], Tensor]:
    """Float64 scores of 3 crops of 8 images and their labels."""
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(3 * 8, 4 + h, generator=generator, dtype=torch.float64) for h in range(heads)]
    labels = torch.randint(4, (heads, 8), generator=generator)
    labels[:, 8 - ignored :] = IGNORED
    return scores, labels


def test_loss_equals_the_loop() -> None:
    scores, labels = problem()
    terms = []
    for head, scores_RK in enumerate(scores):
        log_p = (scores_RK / 0.1).log_softmax(1)
        rows = [(v * 8 + b, labels[head, b]) for v in range(3) for b in range(8) if labels[head, b] != IGNORED]
        terms.append(-sum(log_p[row, label] for row, label in rows) / len(rows))
    ours = multi_head_cross_entropy(scores, labels, 0.1)
    torch.testing.assert_close(ours, sum(terms) / 2)
    peer = sum(F.cross_entropy(s / 0.1, row.repeat(3)) for s, row in zip(scores, labels, strict=True)) / 2
    torch.testing.assert_close(ours, peer)


def test_a_batch_without_labels_has_loss_and_gradient_zero() -> None:
    scores, labels = problem(ignored=8)
    scores = [s.requires_grad_() for s in scores]
    loss = multi_head_cross_entropy(scores, labels, 0.1)
    assert loss.item() == 0 and all(torch.equal(g, torch.zeros_like(g)) for g in torch.autograd.grad(loss, scores))


def on_ranks(rank: int, world_size: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Loss and gradients of a rank's share of the images; ignored ones all lie on the last rank."""
    scores, labels = problem(ignored=3)
    share = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    mine = [s.view(3, 8, -1)[:, share].flatten(0, 1).clone().requires_grad_() for s in scores]
    loss = multi_head_cross_entropy(mine, labels[:, share], 0.1)
    return loss.detach(), torch.autograd.grad(loss, mine)


def test_average_over_ranks_is_the_loss_of_the_whole_batch() -> None:
    loss, grads = on_ranks(0, 1)
    parts = run_ranks(on_ranks, 4)
    torch.testing.assert_close(sum(part[0] for part in parts) / 4, loss)
    for head, grad in enumerate(grads):
        together = torch.cat([part[1][head].unflatten(0, (3, -1)) for part in parts], dim=1) / 4
        torch.testing.assert_close(together.flatten(0, 1), grad)
