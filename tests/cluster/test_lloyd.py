from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from clusterssl.cluster import lloyd, nearest
from clusterssl.cluster.lloyd import Found, Lloyd
from clusterssl.cluster.nearest import Target
from tests.cluster.blobs import blobs


def euclidean(shift_D: Tensor, centroids_KD: Tensor) -> Target:
    near_KD = centroids_KD - shift_D
    return Target(near_KD, shift_D, near_KD.square().sum(1) / 2)


def moves(start_KD: Tensor, seed: int) -> Iterator[Tensor]:
    """Centroids that all move, then some, then one, then none, then a tenth leaves for far away."""
    generator, centroids_KD = torch.Generator().manual_seed(seed), start_KD
    yield centroids_KD
    for share, size in ((1.0, 0.3), (0.5, 0.3), (0.3, 0.05), (0.02, 0.3), (0.0, 0.0), (0.1, 3.0), (0.2, 0.2)):
        chosen = torch.rand(len(start_KD), 1, generator=generator) < share
        centroids_KD = centroids_KD + chosen * size * torch.randn(start_KD.shape, generator=generator).to(start_KD)
        yield centroids_KD


def expected(x_ND: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """Scores of all centroids in float64, and the best of each row."""
    scores_NK = target.near(x_ND).double() @ target.centroids_KD.double().T
    if target.offset_K is not None:
        scores_NK = scores_NK - target.offset_K.double()
    return scores_NK, scores_NK.max(1).values


def check(found: Found, x_ND: Tensor, target: Target, tolerance: float) -> None:
    scores_NK, best_N = expected(x_ND, target)
    mine_N = scores_NK.gather(1, found.labels_N[:, None])[:, 0]
    torch.testing.assert_close(mine_N, best_N, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.scores_N.double(), best_N, rtol=tolerance, atol=tolerance)
    assert abs(found.score_sum - float(best_N.sum())) < tolerance * len(x_ND)
    assert torch.equal(found.counts_K, torch.bincount(found.labels_N, minlength=scores_NK.shape[1]))


@pytest.mark.parametrize("kind", ["products", "distances"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_every_step_is_that_of_a_full_search(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    x_ND = (blobs(3000, 10, 60, unit=kind == "products") + (kind == "distances")).to(dtype)
    target = Target if kind == "products" else partial(euclidean, x_ND.mean(0))
    steps = Lloyd(x_ND, target, "torch")
    for centroids_KD in moves(x_ND[:300].clone(), seed=3):
        found = steps.step(centroids_KD, learn=True)
        check(found, x_ND, target(centroids_KD), tolerance)
        afresh = torch.zeros(300, 10, dtype=torch.float64).index_add_(0, found.labels_N, x_ND.double())
        assert torch.equal(found.sums_KD, afresh)


def test_a_step_without_learning_keeps_the_sums_right() -> None:
    x_ND = blobs(2000, 8, 40)
    steps, generator = Lloyd(x_ND, Target, "torch"), torch.Generator().manual_seed(0)
    start_KD = x_ND[:50].clone()
    steps.step(start_KD, learn=True)
    steps.step(start_KD + 0.2 * torch.randn(start_KD.shape, generator=generator), learn=False)
    found = steps.step(start_KD + 0.001, learn=True)
    afresh = torch.zeros(50, 8, dtype=torch.float64).index_add_(0, found.labels_N, x_ND.double())
    torch.testing.assert_close(found.sums_KD, afresh, rtol=0, atol=1e-12)


def test_a_settled_step_compares_with_what_moved_only(monkeypatch: pytest.MonkeyPatch) -> None:
    x_ND, compared = blobs(2000, 8, 40), []

    def counted(x_nD: Tensor, target: Target) -> nearest.Found:
        compared.append(len(x_nD) * len(target.centroids_KD))
        return nearest.search_torch(x_nD, target)

    monkeypatch.setitem(lloyd.SEARCHES, "torch", counted)
    steps, start_KD = Lloyd(x_ND, Target, "torch"), x_ND[:50].clone()
    work = []
    for centroids_KD in (start_KD, start_KD, start_KD * torch.where(torch.arange(50) == 7, 1.1, 1.0)[:, None]):
        compared.clear()
        steps.step(centroids_KD, learn=True)
        work.append(sum(compared))
    assert work == [2000 * 50, 0, 2000 * 1]


def test_equal_rows_and_equal_centroids_go_to_the_first() -> None:
    x_ND = torch.eye(4).repeat(50, 1)
    steps, centroids_KD = Lloyd(x_ND, Target, "torch"), torch.eye(4).repeat(3, 1)
    for moved in (None, 9, 5):
        if moved is not None:  # back and forth, so that it moved and is again as good as the first
            steps.step(centroids_KD * torch.where(torch.arange(12) == moved, 0.5, 1.0)[:, None], learn=True)
        assert torch.equal(steps.step(centroids_KD, learn=True).labels_N, torch.arange(4).repeat(50))


@pytest.mark.parametrize("clusters", [64, 512])
def test_equal_centroids_that_both_move_go_to_the_first(clusters: int) -> None:
    """Whatever products are taken by one sum and what by another."""
    x_ND = blobs(3000, 24, 60)
    start_KD, generator = x_ND[:clusters].clone(), torch.Generator().manual_seed(1)
    for _ in range(5):
        steps, pair = Lloyd(x_ND, Target, "torch"), torch.randperm(clusters, generator=generator)[:2].sort().values
        before_KD = start_KD.clone()
        before_KD[pair[0]] = -x_ND[0]
        steps.step(before_KD, learn=True)
        after_KD = before_KD.clone()
        after_KD[pair] = 1.1 * start_KD[pair[1]]
        found = steps.step(after_KD, learn=True)
        assert found.counts_K[pair[1]] == 0 and found.counts_K[pair[0]] > 0
