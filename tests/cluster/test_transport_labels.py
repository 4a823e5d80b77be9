from __future__ import annotations

import numpy as np
import pytest
import torch

from clusterssl.cluster.offline import multi_head_cross_entropy
from clusterssl.cluster.transport import TransportOptions
from clusterssl.cluster.transport_labels import TransportLabels
from tests.ranks import run_ranks

OPTIONS = TransportOptions()
IMAGES = 45
"""of which 40 are in slots"""


def labels(kept: int) -> TransportLabels:
    return TransportLabels((6, 4), IMAGES, sharpness=5.0, options=OPTIONS, kept=kept)


def given(rank: int = 0, world_size: int = 1) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """This rank's embeddings, prototypes of both heads, and dataset positions."""
    generator = torch.Generator().manual_seed(0)
    z, weights = (
        torch.randn(40, 8, generator=generator).double(),
        [torch.randn(k, 8, generator=generator).double() for k in (6, 4)],
    )
    where = torch.randperm(IMAGES, generator=generator)[:40]
    mine = slice(rank * 40 // world_size, (rank + 1) * 40 // world_size)
    return z[mine], weights, where[mine]


def of_ranks(rank: int, world_size: int) -> list[torch.Tensor]:
    """Soft labels, losses of the images 0..7 and the gradients of their scores."""
    z, weights, where = given(rank, world_size)
    soft = labels(3)
    for head, weight in enumerate(weights):
        soft.assign(head, z, weight, where, "test")
    index = torch.arange(8)[rank * 8 // world_size : (rank + 1) * 8 // world_size]
    scores = [torch.randn(2, 8, k, generator=torch.Generator().manual_seed(k)).double() for k in (6, 4)]
    scores = [x[:, index].flatten(0, 1).requires_grad_() for x in scores]
    loss = soft.cross_entropy(scores, index, 0.1)
    loss.backward()
    return [soft.weights_HNJ, soft.clusters_HNJ, loss.detach(), *(x.grad.unflatten(0, (2, -1)) for x in scores)]


def test_soft_labels_are_the_largest_entries_of_the_plan() -> None:
    z, weights, where = given()
    soft = labels(3)
    for head, weight in enumerate(weights):
        hard_M = soft.assign(head, z, weight, where, "test")
        plan = torch.softmax(5 * z @ weight.T + soft.potentials[head], 1)
        np.testing.assert_allclose(plan.sum(0), 40 / len(weight), rtol=0.01)
        top, clusters = plan.topk(3)
        assert torch.equal(hard_M, clusters[:, 0])
        assert torch.equal(soft.clusters_HNJ[head, where].long(), clusters)
        torch.testing.assert_close(soft.weights_HNJ[head, where], (top / top.sum(1, keepdim=True)).float())
    unseen = sorted(set(range(IMAGES)) - set(where.tolist()))
    assert not soft.weights_HNJ[:, unseen].any()


def test_loss_is_the_cross_entropy_of_the_labelled_rows() -> None:
    z, weights, where = given()
    soft = labels(4)
    for head, weight in enumerate(weights):
        soft.assign(head, z, weight, where, "test")
    index = torch.arange(IMAGES)
    scores = [torch.randn(2 * IMAGES, k) for k in (6, 4)]
    losses = []
    for head, x in enumerate(scores):
        rows = torch.zeros(IMAGES, x.shape[1]).scatter_(1, soft.clusters_HNJ[head].long(), soft.weights_HNJ[head])
        each = -(rows.repeat(2, 1) * torch.log_softmax(x / 0.1, 1)).sum(1)
        losses.append(each.sum() / 80)
    torch.testing.assert_close(soft.cross_entropy(scores, index, 0.1), torch.stack(losses).mean())
    unseen = torch.tensor(sorted(set(range(IMAGES)) - set(where.tolist())))
    nothing = soft.cross_entropy([torch.randn(len(unseen), k) for k in (6, 4)], unseen, 0.1)
    assert nothing == 0


def test_nearly_hard_soft_labels_lose_what_hard_ones_do() -> None:
    z, weights, where = given()
    sharp = TransportLabels((6, 4), IMAGES, sharpness=3000.0, options=OPTIONS, kept=2)
    table = torch.full((2, IMAGES), -100)
    for head, weight in enumerate(weights):
        table[head, where] = sharp.assign(head, z, weight, where, "test")
    settled = (sharp.weights_HNJ.amax(2) > 0.9999).all(0).nonzero()[:, 0]
    assert len(settled) > 20
    scores = [torch.randn(len(settled), k) for k in (6, 4)]
    hard = multi_head_cross_entropy(scores, table[:, settled], 0.1)
    torch.testing.assert_close(sharp.cross_entropy(scores, settled, 0.1), hard, rtol=2e-3, atol=0)


def test_two_ranks_equal_one() -> None:
    alone, together = of_ranks(0, 1), run_ranks(of_ranks, 2)
    for part in together:
        torch.testing.assert_close(part[0], alone[0])
        assert torch.equal(part[1], alone[1])
    assert (together[0][2] + together[1][2]) / 2 == pytest.approx(float(alone[2]), abs=1e-9)
    for head in (3, 4):
        torch.testing.assert_close(torch.cat([part[head] for part in together], 1) / 2, alone[head])


def test_state_is_taken_back() -> None:
    z, weights, where = given()
    for kept in (1, 3):
        first, second = labels(kept), labels(kept)
        for head, weight in enumerate(weights):
            first.assign(head, z, weight, where, "test")
        state = first.state_dict()
        second.load_state_dict(state)
        assert ("soft_weights" in state) == (kept > 1)
        assert all(torch.equal(a, b) for a, b in zip(first.potentials, second.potentials, strict=True))
        assert torch.equal(first.weights_HNJ, second.weights_HNJ) and torch.equal(
            first.clusters_HNJ, second.clusters_HNJ
        )
