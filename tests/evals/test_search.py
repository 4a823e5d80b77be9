"""The search for nearest neighbours, by faiss and without it, against all distances in float64."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from clusterssl.errors import UserError
from clusterssl.evals import search

faiss = pytest.importorskip("faiss")


def rows(number: int, dim: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(50, dim, generator=torch.Generator().manual_seed(99))
    noise = 2 * torch.randn(number, dim, generator=generator)
    return 3 * (centres[torch.randint(50, (number,), generator=generator)] + noise)


def brute_force(bank: torch.Tensor, queries: torch.Tensor) -> np.ndarray:
    """All cosines, float64."""
    unit = [x.double().numpy() / np.linalg.norm(x.double().numpy(), axis=1, keepdims=True) for x in (queries, bank)]
    return unit[0] @ unit[1].T


@pytest.mark.parametrize("k", [1, 20, 200])
@pytest.mark.parametrize("way", ["faiss", "faiss in blocks", "without faiss"])
def test_finds_the_nearest(monkeypatch: pytest.MonkeyPatch, k: int, way: str) -> None:
    bank, queries = rows(20_000, 24, 1), rows(150, 24, 2)
    assert search.searched_by_faiss(len(bank), bank)
    if way == "without faiss":
        monkeypatch.setattr(search, "searched_by_faiss", lambda *_: False)
        monkeypatch.setitem(sys.modules, "faiss", None)
    if way == "faiss in blocks":
        monkeypatch.setattr(search, "_FAISS_BYTES", 4 * 24 * 7000)
    found = search.nearest(bank, queries.split(64), k)
    similarity, row = (torch.cat(each).numpy() for each in zip(*found, strict=True))
    cosines = brute_force(bank, queries)
    expected = np.sort(cosines, axis=1)[:, ::-1][:, :k]
    np.testing.assert_allclose(similarity, expected, atol=2e-6)
    np.testing.assert_allclose(np.take_along_axis(cosines, row, 1), expected, atol=2e-6)
    assert all(len(set(line)) == k for line in row.tolist())


def test_equal_rows_come_in_the_order_of_their_numbers() -> None:
    bank = rows(3000, 8, 1).repeat(6, 1)  # every row six times
    ((_, row),) = search.nearest(bank, [bank[:40]], 6)
    assert row.tolist() == [[i + 3000 * copy for copy in range(6)] for i in range(40)]


def test_a_chunk_finds_the_same_whatever_the_others_are() -> None:
    """Ranks share out the chunks: the answer must not depend on how."""
    bank, queries = rows(20_000, 24, 1), rows(192, 24, 2)
    together = search.nearest(bank, queries.split(64), 20)
    for chunk, (similarity, row) in zip(queries.split(64), together, strict=True):
        ((alone, alone_row),) = search.nearest(bank, [chunk], 20)
        assert torch.equal(alone, similarity) and torch.equal(alone_row, row)


def test_small_and_precise_features_stay_here() -> None:
    bank = rows(20_000, 8, 1)
    assert not search.searched_by_faiss(1000, bank)
    assert not search.searched_by_faiss(len(bank), bank.double())


@pytest.mark.parametrize("number", [100, 20_000])
@pytest.mark.parametrize("where", ["bank", "queries"])
def test_refuses_what_is_not_finite(number: int, where: str) -> None:
    parts = {"bank": rows(number, 8, 1), "queries": rows(10, 8, 2)}
    parts[where][7, 3] = float("inf")
    with pytest.raises(UserError, match="features are not finite"):
        search.nearest(parts["bank"], [parts["queries"]], 5)
