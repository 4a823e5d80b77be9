"""The nearest centroid by one GPU kernel, run by Triton's interpreter on a CPU, beside float64.

Run by `test_kernels.py` in a process of its own: Triton decides when it is imported what it does with kernels.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clusterssl.cluster import lloyd
from clusterssl.cluster.kmeans import spherical_kmeans
from clusterssl.cluster.nearest import Target, search_in_one_kernel

CASES = [(1, 1, 1), (5, 3, 2), (130, 7, 128), (128, 128, 32), (300, 257, 40), (64, 129, 300), (200, 1000, 128)]
"""rows, centroids, dimension: below, at and beyond the edges of tiles"""


def found(x_ND: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """Labels and scores of all rows."""
    rows, labels, scores = zip(*search_in_one_kernel(x_ND, target), strict=True)
    assert sum(one.stop - one.start for one in rows) == len(x_ND)
    return torch.cat(labels), torch.cat(scores)


@pytest.mark.parametrize("rows, clusters, dim", CASES)
@pytest.mark.parametrize("euclidean", [False, True])
def test_every_row_gets_its_highest_score(rows: int, clusters: int, dim: int, euclidean: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    x_ND = torch.randn(rows, dim, generator=generator)
    c_KD = torch.randn(clusters, dim, generator=generator)
    shift_D = torch.randn(dim, generator=generator) if euclidean else None
    target = Target(c_KD, shift_D, c_KD.square().sum(1) / 2 if euclidean else None)
    labels_N, scores_N = found(x_ND, target)
    near_ND = (x_ND if shift_D is None else x_ND - shift_D).double()
    exact_NK = near_ND @ c_KD.double().T - (c_KD.double().square().sum(1) / 2 if euclidean else 0)
    assert labels_N.dtype == torch.int64
    mine_N = exact_NK.gather(1, labels_N[:, None])[:, 0]
    assert bool((exact_NK.amax(1) - mine_N <= 1e-5 * dim**0.5).all())
    torch.testing.assert_close(scores_N.double(), mine_N, rtol=1e-5, atol=1e-5 * dim**0.5)


def test_of_equal_scores_the_first_wins() -> None:
    c_KD = torch.tensor([[0.0, 1.0]] * 140 + [[1.0, 0.0]] * 200 + [[0.0, 1.0]])
    labels_N, _ = found(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]), Target(c_KD))
    assert labels_N.tolist() == [140, 0, 0]


def test_rows_that_do_not_lie_together() -> None:
    generator = torch.Generator().manual_seed(3)
    x_ND, c_KD = torch.randn(40, 200, generator=generator).T, torch.randn(20, 40, generator=generator)
    labels_N, _ = found(x_ND, Target(c_KD))
    assert torch.equal(labels_N, (x_ND @ c_KD.T).argmax(1))


def test_none_of_no_rows() -> None:
    assert list(search_in_one_kernel(torch.empty(0, 4), Target(torch.randn(3, 4)))) == []


def test_k_means_comes_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(5)
    centers_KD = F.normalize(torch.randn(12, 16, generator=generator), dim=1)
    x_ND = F.normalize(centers_KD.repeat(40, 1) + 0.1 * torch.randn(480, 16, generator=generator), dim=1)
    expected = spherical_kmeans(x_ND, 12, seed=1)
    monkeypatch.setitem(lloyd.SEARCHES, "torch", search_in_one_kernel)
    ours = spherical_kmeans(x_ND, 12, seed=1)
    assert torch.equal(ours.labels_N, expected.labels_N)
    torch.testing.assert_close(ours.centroids_KD, expected.centroids_KD)
