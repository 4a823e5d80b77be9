from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clusterssl.cluster import nearest
from clusterssl.cluster.coarse import Workspace, candidates, coarse
from clusterssl.cluster.kmeans import KMeansOptions, spherical_kmeans
from clusterssl.cluster.nearest import Target, search_torch


def rows(count: int, dim: int, seed: int) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def near_twins(x_ND: Tensor, clusters: int) -> Tensor:
    """Centroids most of which have a twin that bfloat16 cannot tell apart."""
    half_KD = x_ND[: clusters // 2]
    return torch.cat([half_KD, half_KD + 1e-4 * rows(clusters // 2, x_ND.shape[1], 9)])


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_the_nearest_is_always_a_candidate(scale: float, offset: bool, seed: int) -> None:
    x_ND = scale * rows(600, 24, seed)
    centroids_KD = near_twins(x_ND.abs() if seed == 3 else x_ND, 400)
    offset_K = centroids_KD.square().sum(1) / 2 if offset else None
    x_ND = -x_ND.abs() if seed == 3 else x_ND
    pairs = candidates(x_ND, coarse(centroids_KD, offset_K), Workspace(600, 400))
    assert pairs is not None
    scores_NK = x_ND.double() @ centroids_KD.double().T - (offset_K.double() if offset_K is not None else 0)
    best_N = scores_NK.argmax(1)
    found = set(zip(pairs[0].tolist(), pairs[1].tolist(), strict=True))
    assert all((row, best) in found for row, best in enumerate(best_N.tolist()))
    assert len(found) < 16 * 600


@pytest.mark.parametrize("offset", [False, True])
def test_finds_what_float64_finds(offset: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "supported", lambda: True)
    x_ND = rows(1000, 32, 1)
    centroids_KD = near_twins(x_ND, 500)
    target = Target(centroids_KD, None, centroids_KD.square().sum(1) / 2 if offset else None)
    assert target.coarse is not None
    labels, scores = zip(*((labels, scores) for _, labels, scores in search_torch(x_ND, target)), strict=True)
    taken_K = torch.zeros(500) if target.offset_K is None else target.offset_K
    scores_NK = x_ND.double() @ centroids_KD.double().T - taken_K.double()
    best = scores_NK.max(1)
    torch.testing.assert_close(torch.cat(scores).double(), best.values, rtol=1e-6, atol=1e-5)
    mine = scores_NK.gather(1, torch.cat(labels)[:, None])[:, 0]
    torch.testing.assert_close(mine, best.values, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_rows_that_rounding_cannot_sort_are_compared_exactly(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "supported", lambda: True)
    x_ND, target = torch.full((300, 8), value), Target(torch.ones(300, 8) + 1e-6 * rows(300, 8, 2))
    assert target.coarse is not None and candidates(x_ND, target.coarse, Workspace(300, 300)) is None
    ((_, labels_N, scores_N),) = search_torch(x_ND, target)
    scores_NK = x_ND @ target.centroids_KD.T
    assert torch.equal(labels_N, scores_NK.argmax(1))
    torch.testing.assert_close(scores_N, scores_NK.amax(1))


def test_a_whole_clustering_reaches_the_same_inertia(monkeypatch: pytest.MonkeyPatch) -> None:
    x_ND = torch.nn.functional.normalize(rows(4000, 16, 5) + 3 * rows(40, 16, 6).repeat(100, 1), dim=1)
    found = []
    for has_units in (False, True):
        monkeypatch.setattr(nearest, "supported", lambda has_units=has_units: has_units)
        found.append(spherical_kmeans(x_ND, 300, KMeansOptions(), seed=2).inertia)
    assert abs(found[0][0] / found[1][0] - 1) < 1e-6 and abs(found[0][-1] / found[1][-1] - 1) < 1e-3
