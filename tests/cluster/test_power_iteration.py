from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from clusterssl.cluster.power_iteration import clusters_of_graph, power_iteration_clustering
from clusterssl.errors import UserError
from tests.golden_files import Golden
from tests.ranks import run_ranks

GOLDEN = Golden("dc_pic")


@pytest.mark.parametrize("case", ["blobs", "singletons"])
def test_equals_the_golden_assignment(case: str) -> None:
    given = GOLDEN.params(case)
    index, square = (GOLDEN[f"{case}_{name}"][:, 1:] for name in ("neighbours", "sq_distances"))
    ours = clusters_of_graph(index, square, given["sigma"], given["alpha"], 200)
    assert (ours.of_graph == GOLDEN[f"{case}_assign"]).all()
    assert (ours.merged == GOLDEN[f"{case}_assign_after_singletons"]).all()
    assert ours.merged.max() + 1 == GOLDEN[f"{case}_n_clusters"]


def of_golden_rows(rank: int, world_size: int) -> list[Tensor]:
    labels = []
    for case in ("blobs", "singletons"):
        x, given = torch.from_numpy(GOLDEN[f"{case}_x"]), GOLDEN.params(case)
        mine = x[rank * len(x) // world_size : (rank + 1) * len(x) // world_size]
        of_graph = {"neighbours": given["nnn"], "sigma": given["sigma"], "alpha": given["alpha"]}
        labels.append(power_iteration_clustering(mine, **of_graph))
    return labels


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_from_rows_on_any_number_of_ranks(world_size: int) -> None:
    results = run_ranks(of_golden_rows, world_size) if world_size > 1 else [of_golden_rows(0, 1)]
    for blobs, singletons in results:
        assert blobs.dtype == torch.int64
        assert (blobs.numpy() == GOLDEN["blobs_assign_after_singletons"]).all()
        assert (singletons.numpy() == GOLDEN["singletons_assign_after_singletons"]).all()


def naive(index: np.ndarray, square: np.ndarray, sigma: float, alpha: float) -> tuple[list[int], list[int]]:
    """Point by point with a dense matrix: labels before and after single points join others."""
    size = len(index)
    a = np.zeros((size, size))
    for i in range(size):
        a[i, index[i]] = np.exp(-square[i] / sigma**2)
    w = a + a.T
    v = np.full(size, 1 / size)
    for _ in range(200):
        v = alpha * w.T @ v + (1 - alpha) / size
        v /= v.sum()
    pointer = list(range(size))
    for i in range(size):
        best = 0.0
        for j in np.flatnonzero(w[i]):
            if w[i, j] * (v[j] - v[i]) > best:
                best, pointer[i] = w[i, j] * (v[j] - v[i]), int(j)
    roots = [i for i in range(size) if pointer[i] == i]
    labels = []
    for i in range(size):
        while pointer[i] != i:
            i = pointer[i]
        labels.append(roots.index(i))
    moved = list(labels)
    for i in range(size):
        if labels.count(labels[i]) == 1:
            moved[i] = next((labels[j] for j in index[i] if labels.count(labels[j]) > 1), labels[i])
    names = sorted(set(moved))
    return labels, [names.index(label) for label in moved]


@pytest.mark.parametrize("seed", range(12))
def test_equals_the_naive_loop_on_random_graphs(seed: int) -> None:
    chance = np.random.default_rng(seed)
    size, count = int(chance.integers(3, 60)), int(chance.integers(1, 3))
    index = np.stack([chance.permutation(np.delete(np.arange(size), i))[:count] for i in range(size)])
    square = np.sort(chance.random((size, count)) * 0.2, axis=1)
    ours = clusters_of_graph(index, square, 0.2, 0.001, 200)
    before, after = naive(index, square, 0.2, 0.001)
    assert ours.of_graph.tolist() == before and ours.merged.tolist() == after


def test_a_long_chain_of_pointers_is_followed_to_its_end() -> None:
    size = 300
    index = np.minimum(np.arange(size) + 1, size - 1)[:, None]
    index[-1] = size - 2
    square = (0.2 - 0.0005 * np.arange(size))[:, None]  # ever closer, so the distribution rises along the chain
    ours = clusters_of_graph(index, square, 0.2, 0.001, 200)
    assert (ours.of_graph == ours.of_graph[-1]).sum() > 100
    assert ours.of_graph.tolist() == naive(index, square, 0.2, 0.001)[0]


def test_a_single_point_joins_its_nearest_neighbour_that_is_not_single() -> None:
    """Points 0 and 1 are too far from all others for any weight, and nearest to each other."""
    index = np.array([[1, 2, 5], [0, 5, 2], [3, 4, 0], [2, 4, 0], [2, 3, 0], [6, 7, 1], [5, 7, 1], [5, 6, 1]])
    square = np.array([[50, 51, 52], [50, 51, 52], *[[0.01, 0.02, 50]] * 6])
    square[2, 0] = square[5, 0] = 0.005
    ours = clusters_of_graph(index, square, 0.2, 0.001, 200)
    before, after = naive(index, square, 0.2, 0.001)
    assert ours.of_graph.tolist() == before and ours.merged.tolist() == after
    assert (np.bincount(ours.of_graph) == 1).sum() == 2
    assert ours.merged[0] == ours.merged[2] != ours.merged[5] == ours.merged[1]


def test_a_single_point_whose_neighbours_are_single_stays() -> None:
    """Equal weights: nothing rises, all are roots."""
    index = np.array([[1], [2], [0]])
    ours = clusters_of_graph(index, np.full((3, 1), 0.01), 0.2, 0.001, 200)
    assert ours.of_graph.tolist() == ours.merged.tolist() == [0, 1, 2]


def test_refuses_more_neighbours_than_images() -> None:
    with pytest.raises(UserError, match="--pic_neighbours 5"):
        power_iteration_clustering(torch.randn(4, 3), neighbours=5)
