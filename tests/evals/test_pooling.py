"""Pooling and whitening against the golden vectors, by hand, and against scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from clusterssl import dist
from clusterssl.errors import UserError
from clusterssl.evals.pooling import Moments, described, pooled, rmac_regions
from tests.golden_files import Golden
from tests.ranks import run_ranks

GOLDEN = Golden("eval_metrics")


@pytest.mark.parametrize("case", range(6))
def test_golden_regions(case: int) -> None:
    height, width, levels = GOLDEN[f"rmac_regions{case}_hwl"].tolist()
    assert [list(region) for region in rmac_regions(height, width, levels)] == GOLDEN[f"rmac_regions{case}"].tolist()


def test_regions_lie_inside_and_cover() -> None:
    for height in range(1, 40, 3):
        for width in range(1, 40, 2):
            seen = np.zeros((height, width), dtype=bool)
            for x, y, w, h in rmac_regions(height, width, 3):
                assert x >= 0 and y >= 0 and w > 0 and x + w <= width and y + h <= height
                seen[y : y + h, x : x + w] = True
            assert seen.any() and (seen.mean() > 0.8 or min(height, width) < 4), (height, width)


def golden_whitening() -> tuple[torch.Tensor, torch.Tensor]:
    moments = Moments(12)
    for rows in torch.from_numpy(GOLDEN["rmac_pca_x"]).split(70):
        moments.add(rows)
    return moments.whitening(6)


def test_golden_whitening() -> None:
    mean, projection = golden_whitening()
    np.testing.assert_allclose(mean, GOLDEN["rmac_pca_mean"][0], atol=1e-9)
    matrix = GOLDEN["rmac_pca_matrix"]
    signs = np.sign((projection.T.numpy() * matrix).sum(1, keepdims=True))
    np.testing.assert_allclose(projection.T.numpy(), signs * matrix, atol=1e-6 * np.abs(matrix).max())


def test_golden_descriptor() -> None:
    feature_map = torch.from_numpy(GOLDEN["rmac_feature_map"])[0]
    vectors = pooled(feature_map, "rmac", levels=3)
    np.testing.assert_allclose(vectors, GOLDEN["rmac_regions_desc"][0], atol=1e-9)
    mean, matrix = (torch.from_numpy(GOLDEN[f"rmac_pca_{name}"]) for name in ("mean", "matrix"))
    np.testing.assert_allclose(described(vectors, (mean[0], matrix.T)), GOLDEN["rmac_descriptor"][0], atol=1e-9)
    ours, theirs = described(vectors, golden_whitening()), GOLDEN["rmac_descriptor"][0]
    np.testing.assert_allclose(ours.abs().numpy(), np.abs(theirs), atol=1e-6)


def test_whitening_is_scikit_learns() -> None:
    from sklearn.decomposition import PCA

    x = np.random.default_rng(0).normal(size=(200, 5)) @ np.diag([5.0, 4, 3, 2, 1]) + 7
    moments = Moments(5)
    moments.add(torch.from_numpy(x))
    mean, projection = moments.whitening(3)
    ours = (torch.from_numpy(x) - mean) @ projection
    theirs = PCA(3, whiten=True).fit_transform(x) / np.sqrt(199)  # the eigenvalues are those of a sum, not of a mean
    np.testing.assert_allclose(ours.abs().numpy(), np.abs(theirs), atol=1e-9)


def test_small_eigenvalues_are_raised() -> None:
    x = torch.zeros(10, 3, dtype=torch.float64)
    x[:, 0] = torch.arange(10.0)
    moments = Moments(3)
    moments.add(x)
    _, projection = moments.whitening(3)
    largest = float((x[:, 0] - 4.5).square().sum())
    assert projection.norm(dim=0).tolist() == pytest.approx(
        [largest**-0.5, (1e-5 * largest) ** -0.5, (1e-5 * largest) ** -0.5]
    )


def test_pooling_by_hand() -> None:
    x = torch.tensor([[[3.0, 0.0], [0.0, 0.0]], [[2.0, 2.0], [2.0, 2.0]]], dtype=torch.float64)
    average, gem = pooled(x, "avg")[0], pooled(x, "gem", p=2.0)[0]
    assert average.tolist() == pytest.approx([0.75 / np.hypot(0.75, 2), 2 / np.hypot(0.75, 2)])
    assert gem.tolist() == pytest.approx([1.5 / 2.5, 2 / 2.5], abs=1e-5)
    torch.testing.assert_close(pooled(x, "gem", p=1.0)[0], average, atol=1e-5, rtol=0)
    assert pooled(x, "rmac", levels=1).tolist() == [pytest.approx([3 / np.hypot(3, 2), 2 / np.hypot(3, 2)])]
    two = torch.eye(2, dtype=torch.float64)
    assert described(two, None).tolist() == pytest.approx([0.5**0.5] * 2)


def on_a_rank(rank: int, world_size: int) -> Any:
    x = torch.from_numpy(GOLDEN["rmac_pca_x"])
    first, last = dist.share(101)
    moments = Moments(12)
    moments.add(x[:101][first:last])
    return [y.numpy() for y in moments.whitening(4)]


def test_two_ranks_equal_one() -> None:
    alone = on_a_rank(0, 1)
    for found in run_ranks(on_a_rank, 2):
        np.testing.assert_allclose(found[0], alone[0], atol=1e-12)
        np.testing.assert_allclose(np.abs(found[1]), np.abs(alone[1]), atol=1e-8 * np.abs(alone[1]).max())


def test_too_many_components() -> None:
    moments = Moments(4)
    moments.add(torch.rand(3, 4))
    for components in (5, 3):
        with pytest.raises(UserError, match=f"--n_pca {components}: 3 vectors of 4 numbers"):
            moments.whitening(components)
