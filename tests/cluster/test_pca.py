from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from torch import Tensor

from clusterssl.cluster import pca
from clusterssl.errors import UserError
from tests.golden_files import Golden
from tests.ranks import run_ranks

GOLDEN = Golden("dc_pca_whitening")


def rows(count: int, size: int, mean: float = 0.0, seed: int = 0) -> Tensor:
    """Correlated rows whose components have clearly different variances."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    spread = torch.linspace(3, 0.1, size, dtype=torch.float64)
    return (torch.randn(count, size, generator=generator, dtype=torch.float64) * spread) @ basis + mean


def largest_difference(ours: np.ndarray, expected: np.ndarray) -> float:
    """Up to the sign of each column."""
    return float(np.abs(ours * np.sign((ours * expected).sum(0)) - expected).max())


def reference(x: np.ndarray, dim: int) -> np.ndarray:
    """By singular value decomposition of the centred rows, float64."""
    left = np.linalg.svd(x - x.mean(0), full_matrices=False)[0][:, :dim]
    return left / np.linalg.norm(left, axis=1, keepdims=True)


@pytest.mark.parametrize("case", ["full_rank", "keep_all"])
def test_equals_the_golden_features_up_to_sign(case: str) -> None:
    ours = pca.whiten(torch.from_numpy(GOLDEN[f"{case}_x"]), GOLDEN.params(case)["pca"])
    assert ours.dtype == torch.float32
    assert largest_difference(ours.numpy(), GOLDEN[f"{case}_y"]) < 1e-4


def test_equals_faiss_up_to_sign() -> None:
    faiss = pytest.importorskip("faiss")
    x = rows(1500, 48, mean=2.0).float().numpy()
    theirs = faiss.PCAMatrix(48, 16, -0.5)  # the power of the eigenvalues
    theirs.train(x)
    expected = theirs.apply(x)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert largest_difference(pca.whiten(torch.from_numpy(x), 16).numpy(), expected) < 1e-3


def test_equals_the_singular_value_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    """In several chunks of rows, the last one smaller."""
    monkeypatch.setattr(pca, "_CHUNK_BYTES", 8 * 20 * 64)
    x = rows(150, 20)
    assert largest_difference(pca.whiten(x, 20).numpy(), reference(x.numpy(), 20)) < 1e-10


def test_a_large_mean_costs_no_digits() -> None:
    x = rows(400, 12, mean=1000.0).float()
    assert largest_difference(pca.whiten(x, 12).numpy(), reference(x.double().numpy(), 12)) < 1e-4


def test_components_are_uncorrelated_and_rows_have_unit_length(monkeypatch: pytest.MonkeyPatch) -> None:
    x = rows(300, 10)
    assert torch.allclose(pca.whiten(x, 6).norm(dim=1), torch.ones(300, dtype=torch.float64))
    monkeypatch.setattr(pca.F, "normalize", lambda y, dim: y)
    covariance = torch.cov(pca.whiten(x, 6).T, correction=0)
    torch.testing.assert_close(covariance, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-10)


def test_signs_follow_the_largest_entry_of_each_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.diag(torch.tensor([3.0, -2.0, 1.0, 0.5]).double())
    x = torch.cat([x, -x])  # the axes are the coordinates
    ours = pca.whiten(x, 3)
    assert torch.equal(ours.sign(), x[:, :3].sign())
    assert torch.equal(pca.whiten(x.flip(0), 3).flip(0), ours)


def test_a_component_without_variance_becomes_zero(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.cat([rows(200, 5), torch.full((200, 3), 7.0).double()], dim=1)
    with caplog.at_level(logging.WARNING, "clusterssl"):
        ours = pca.whiten(x, 7)
    assert "2 of 7 components have no variance" in caplog.text
    assert torch.equal(ours[:, 5:], torch.zeros(200, 2).double())
    assert largest_difference(ours[:, :5].numpy(), reference(x[:, :5].numpy(), 5)) < 1e-9


def whitened(rank: int, world_size: int, bounds: list[int]) -> Tensor:
    return pca.whiten(rows(180, 9, mean=0.3)[bounds[rank] : bounds[rank + 1]], 5)


@pytest.mark.parametrize("bounds", [[0, 90, 180], [0, 30, 30, 171, 180]], ids=["2", "4, one without rows"])
def test_many_ranks_equal_one(bounds: list[int]) -> None:
    parts = run_ranks(whitened, len(bounds) - 1, bounds)
    torch.testing.assert_close(torch.cat(parts), whitened(0, 1, [0, 180]), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("x", "dim", "words"),
    [
        (torch.randn(50, 8), 9, ["PCA to 9", "50 images with 8 features", "at most 8", "--pca_dim"]),
        (torch.randn(8, 20), 8, ["PCA to 8", "8 images", "at most 7"]),
        (torch.tensor([[1.0, 2], [3, float("nan")], [0, 1]]), 1, ["not finite"]),
        (torch.tensor([[1.0, 2], [3, float("inf")], [0, 1]]), 1, ["not finite"]),
        (torch.ones(20, 4) / 3, 2, ["equal", "collapsed"]),
    ],
)
def test_refuses_what_it_cannot_whiten(x: Tensor, dim: int, words: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        pca.whiten(x, dim)
    assert "\n" not in str(refused.value) and all(word in str(refused.value) for word in words)
