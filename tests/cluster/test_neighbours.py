from __future__ import annotations

import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from clusterssl.cluster import neighbours
from clusterssl.errors import UserError
from tests.ranks import run_ranks


def points(count: int, dim: int = 6) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize(("block", "chunk"), [(1 << 15, 1 << 26), (17, 1 << 26), (16, 8 * 7 * 40)])
def test_equals_sklearn(block: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one piece, in blocks and in chunks of queries."""
    monkeypatch.setattr(neighbours, "_BLOCK_ROWS", block)
    monkeypatch.setattr(neighbours, "_CHUNK_BYTES", chunk)
    x = points(120)
    index, square = neighbours.nearest_neighbours(x, 5)
    distance, expected = NearestNeighbors(n_neighbors=6, algorithm="brute").fit(x).kneighbors(x)
    assert (index.numpy() == expected[:, 1:]).all()
    torch.testing.assert_close(square, torch.from_numpy(distance[:, 1:] ** 2), rtol=1e-9, atol=0)


def test_small_distances_far_from_the_origin_keep_their_digits() -> None:
    x = torch.tensor([[1000.0], [1000.001], [1003.0], [1010.0]])
    _, square = neighbours.nearest_neighbours(x, 1)
    torch.testing.assert_close(square[:, 0], torch.tensor([1e-6, 1e-6, 9, 49]), rtol=0.1, atol=0)


def test_a_copy_is_a_neighbour_but_not_the_point_itself() -> None:
    x = torch.tensor([[0.0], [5.0], [0.0], [0.0], [7.0]])
    index, square = neighbours.nearest_neighbours(x, 4)
    assert [set(row[:2].tolist()) for row in index[[0, 2, 3]]] == [{2, 3}, {0, 3}, {0, 2}]
    assert all(sorted([number, *row]) == [0, 1, 2, 3, 4] for number, row in enumerate(index.tolist()))
    assert torch.isfinite(square).all()


def found(rank: int, world_size: int, bounds: list[int]) -> tuple[Tensor, Tensor]:
    return neighbours.nearest_neighbours(points(60)[bounds[rank] : bounds[rank + 1]], 4)


def test_many_ranks_equal_one() -> None:
    """One of them without rows, one with fewer rows than neighbours."""
    bounds = [0, 2, 2, 40, 60]
    parts = run_ranks(found, len(bounds) - 1, bounds)
    for together, alone in zip(zip(*parts, strict=True), found(0, 1, [0, 60]), strict=True):
        assert torch.equal(torch.cat(together), alone)


def test_refuses_more_neighbours_than_other_points() -> None:
    assert neighbours.nearest_neighbours(points(5), 4)[0].shape == (5, 4)
    with pytest.raises(UserError, match="--pic_neighbours 5: needs more than 5 images, there are 5"):
        neighbours.nearest_neighbours(points(5), 5)
