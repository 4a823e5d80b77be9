from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clusterssl.cluster import kmeans as km
from clusterssl.cluster import nearest
from clusterssl.cluster.empty import split_largest
from clusterssl.cluster.kmeans import Clusters, KMeansOptions, euclidean_kmeans, memory_estimate, spherical_kmeans
from clusterssl.cluster.memory import label_table
from clusterssl.errors import UserError
from tests.golden_files import Golden
from tests.ranks import run_ranks

GOLDEN = Golden("dcv2_cluster_memory")
AS_PUBLISHED = KMeansOptions(kmeans_empty="keep")


def blobs(n: int, dim: int, centres: int, seed: int = 0, spread: float = 0.3, unit: bool = True) -> Tensor:
    """Rows around random centres, in random order."""
    generator = torch.Generator().manual_seed(seed)
    around = torch.randn(centres, dim, generator=generator)
    x = around[torch.randint(centres, (n,), generator=generator)] + spread * torch.randn(n, dim, generator=generator)
    return F.normalize(x, dim=1) if unit else x


def golden_case(rank: int, world_size: int, case: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """Label table and centroids of a golden case, each rank with its own memory."""
    end = f"_r{rank}" if world_size > 1 else ""
    given = GOLDEN.params(case)
    memory, index = (torch.from_numpy(GOLDEN[f"{case}_{name}{end}"]) for name in ("memory", "index"))
    owner = torch.from_numpy(GOLDEN[f"{case}_memory{'_r0' if world_size > 1 else ''}"])
    options = KMeansOptions(kmeans_iters=given["iters"], kmeans_empty="keep")
    found = []
    for head, clusters in enumerate(given["K"]):
        first = torch.from_numpy(GOLDEN[f"{case}_perm{head}"][:clusters])
        crop = head % given["crops"]
        found.append(spherical_kmeans(memory[crop], owner[crop][first], options))
    labels = torch.stack([one.labels_N for one in found])
    slots = torch.arange(len(index)) + rank * len(index)
    return label_table(labels, index, slots, given["N"]).numpy(), [one.centroids_KD.numpy() for one in found]


CASES = [name.removesuffix("_params") for name in GOLDEN.names() if name.endswith("_params")]


@pytest.mark.parametrize("case", CASES)
def test_equals_the_published_clustering(case: str) -> None:
    world_size = GOLDEN.params(case).get("world", 1)
    results = run_ranks(golden_case, world_size, case) if world_size > 1 else [golden_case(0, 1, case)]
    for table, centroids in results:
        np.testing.assert_array_equal(table, GOLDEN[f"{case}_assignments"])
        for head, ours in enumerate(centroids):
            np.testing.assert_allclose(ours, GOLDEN[f"{case}_centroids{head}"], rtol=0, atol=1e-5)


def reference(x: np.ndarray, centroids: np.ndarray, iterations: int, spherical: bool) -> tuple:
    """Lloyd's algorithm in float64 with explicit loops; empty clusters stay."""
    x, centroids, inertia = x.astype(np.float64), centroids.astype(np.float64), []
    for iteration in range(iterations + 1):
        distance = ((x[:, None] - centroids[None]) ** 2).sum(2)
        labels = distance.argmin(1)
        inertia.append(distance.min(1).sum())
        for k in set(labels.tolist()) if iteration < iterations else ():
            centroids[k] = x[labels == k].mean(0)
            if spherical:
                centroids[k] /= np.linalg.norm(centroids[k])
    return labels, centroids, inertia


@pytest.mark.parametrize("spherical", [True, False])
def test_equals_the_loops_in_float64(spherical: bool) -> None:
    x = blobs(600, 12, 20, unit=spherical, spread=0.2)
    x = x if spherical else x + 50
    run = spherical_kmeans if spherical else euclidean_kmeans
    ours = run(x, x[:15].clone(), KMeansOptions(kmeans_iters=7, kmeans_empty="keep"))
    labels, centroids, inertia = reference(x.numpy(), x[:15].numpy(), 7, spherical)
    np.testing.assert_array_equal(ours.labels_N.numpy(), labels)
    np.testing.assert_allclose(ours.centroids_KD.numpy(), centroids, rtol=0, atol=1e-5)
    np.testing.assert_allclose(ours.inertia, inertia, rtol=2e-5)
    np.testing.assert_array_equal(ours.counts_K.numpy(), np.bincount(labels, minlength=15))


def test_euclidean_reaches_the_inertia_of_sklearn() -> None:
    from sklearn.cluster import KMeans

    x = blobs(2000, 8, 30, unit=False)
    peer = KMeans(30, init=x[:30].numpy(), n_init=1, max_iter=20, tol=0, algorithm="lloyd").fit(x.numpy())
    ours = euclidean_kmeans(x, x[:30].clone(), KMeansOptions(kmeans_iters=20, kmeans_empty="keep"))
    assert abs(ours.inertia[-1] / peer.inertia_ - 1) < 1e-4


def test_reaches_the_inertia_of_faiss() -> None:
    faiss = pytest.importorskip("faiss")
    x = blobs(3000, 16, 40)
    peer = faiss.Kmeans(16, 40, niter=10, spherical=True, min_points_per_centroid=1)
    peer.train(x.numpy(), init_centroids=x[:40].numpy())
    similarity = (x @ F.normalize(torch.from_numpy(peer.centroids), dim=1).T).max(1).values
    ours = spherical_kmeans(x, x[:40].clone(), AS_PUBLISHED)
    assert abs(ours.inertia[-1] / float((2 - 2 * similarity.double()).sum()) - 1) < 1e-3


def test_inertia_falls() -> None:
    for run in (spherical_kmeans, euclidean_kmeans):
        inertia = run(blobs(1500, 10, 25), 25, KMeansOptions(kmeans_empty="keep")).inertia
        assert len(inertia) == 11
        assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(inertia))


@pytest.mark.parametrize("run", [spherical_kmeans, euclidean_kmeans])
def test_does_not_depend_on_the_blocks(run: Callable[..., Clusters], monkeypatch: pytest.MonkeyPatch) -> None:
    x = blobs(5000, 16, 50)
    whole = run(x, 60, seed=3)
    for size in (1, 37, 4999):
        monkeypatch.setattr(nearest, "block_rows", lambda *_, size=size: size)
        if size == 1:
            part = run(x[:300], 20, seed=3)
            monkeypatch.setattr(nearest, "block_rows", lambda *_: 300)
            expected = run(x[:300], 20, seed=3)
        else:
            part, expected = run(x, 60, seed=3), whole
        assert torch.equal(part.labels_N, expected.labels_N)
        torch.testing.assert_close(part.centroids_KD, expected.centroids_KD, rtol=0, atol=1e-6)


def dealt(rank: int, world_size: int, kind: str, options: KMeansOptions) -> Clusters:
    """Cluster rows that are dealt out to the ranks in turns, with uneven numbers."""
    x = blobs(703, 12, 30, unit=kind == "spherical")
    x = torch.cat([x[:1].expand(60, -1), x]) if options.kmeans_empty == "split" else x
    run = spherical_kmeans if kind == "spherical" else euclidean_kmeans
    ids = torch.arange(rank, len(x), world_size)
    return run(x[ids], 40, options, seed=5, draw=2, ids_N=ids)


SETTINGS = [
    ("spherical", AS_PUBLISHED),
    ("spherical", KMeansOptions(kmeans_init="kmeans++")),
    ("euclidean", KMeansOptions()),
]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_find_what_one_rank_finds(world_size: int) -> None:
    for setting, parts in zip(SETTINGS, zip(*run_ranks(all_dealt, world_size), strict=True), strict=True):
        alone = dealt(0, 1, *setting)
        labels = torch.empty_like(alone.labels_N)
        for rank, part in enumerate(parts):
            labels[rank::world_size] = part.labels_N
            torch.testing.assert_close(part.centroids_KD, alone.centroids_KD, rtol=0, atol=1e-6)
            assert torch.equal(part.counts_K, alone.counts_K)
            np.testing.assert_allclose(part.inertia, alone.inertia, rtol=1e-6)
        assert torch.equal(labels, alone.labels_N)


def all_dealt(rank: int, world_size: int) -> list[Clusters]:
    return [dealt(rank, world_size, *setting) for setting in SETTINGS]


def some_ranks_without_rows(rank: int, world_size: int) -> Clusters:
    x = blobs(50, 6, 5)
    return spherical_kmeans(x if rank == 0 else x[:0], 8, seed=1)


def test_a_rank_may_hold_no_rows() -> None:
    first, second = run_ranks(some_ranks_without_rows, 2)
    alone = some_ranks_without_rows(0, 1)
    assert torch.equal(first.labels_N, alone.labels_N) and len(second.labels_N) == 0


def test_start_draws_different_rows_for_each_seed_and_draw() -> None:
    x = blobs(400, 8, 400, spread=1)
    one = KMeansOptions(kmeans_iters=1)
    starts = [spherical_kmeans(x, 30, one, seed=s, draw=d).centroids_KD for s, d in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2]) and not torch.equal(starts[0], starts[3])


def test_random_start_takes_every_row_equally_often() -> None:
    from clusterssl.cluster.rows import GlobalRows
    from clusterssl.cluster.seeding import random_rows

    rows = GlobalRows(torch.arange(20.0)[:, None])
    taken = torch.cat([random_rows(rows, 5, 0, draw)[:, 0] for draw in range(2000)])
    assert all(len(part.unique()) == 5 for part in taken.split(5))
    counts = torch.bincount(taken.long(), minlength=20)
    assert abs(counts - 500).max() < 5 * np.sqrt(500 * 0.75)


def test_plus_plus_finds_all_far_groups_where_a_random_start_does_not() -> None:
    x = blobs(2000, 16, 40, spread=0.02)
    far = [spherical_kmeans(x, 40, KMeansOptions(kmeans_init="kmeans++"), seed=s).inertia[-1] for s in range(3)]
    assert max(far) < 0.3 * min(spherical_kmeans(x, 40, seed=s).inertia[-1] for s in range(3))


def test_split_leaves_no_cluster_empty_even_of_equal_rows() -> None:
    equal = F.normalize(torch.ones(30, 4), dim=1)
    some = torch.cat([equal, blobs(10, 4, 10)])
    for x, clusters in ((equal, 30), (equal, 7), (some, 40), (some, 25)):
        for run in (spherical_kmeans, euclidean_kmeans):
            found = run(x, clusters)
            counts = torch.bincount(found.labels_N, minlength=clusters)
            assert counts.min() >= 1 and torch.equal(counts, found.counts_K)
            assert torch.isfinite(found.centroids_KD).all()


def test_filled_clusters_take_the_farthest_rows() -> None:
    """Two copies of one start: the second is empty after the only search when nothing is split before."""
    x = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.9], [1.0, -0.3]]), dim=1)
    one = KMeansOptions(kmeans_iters=1, kmeans_empty="split")
    problem = km._Problem(km.GlobalRows(x), True)
    start = x[:1].expand(2, -1)
    found = km._search(problem, start, one, learn=False)
    assert found.labels_N.tolist() == [0, 0, 0, 0], "of equal scores the first centroid wins"
    centroids, counts = km.fill_empty(
        problem.rows, found.labels_N, problem.distances(found.scores_N), found.counts_K, start
    )
    assert found.labels_N.tolist() == [0, 0, 1, 0] and counts.tolist() == [3, 1]
    torch.testing.assert_close(centroids[1], x[2])


def test_splitting_halves_the_largest_cluster_again_and_again() -> None:
    centroids = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0], [9.0, 9.0]])
    new = split_largest(centroids, torch.tensor([100, 0, 40, 0, 0]))
    up, down = torch.tensor([1 + 1 / 1024, 1 - 1 / 1024]), torch.tensor([1 - 1 / 1024, 1 + 1 / 1024])
    first = centroids[0]  # 100 -> 50 and 50, then 50 -> 25 and 25 twice: the lower number first
    torch.testing.assert_close(new[2], centroids[2])
    torch.testing.assert_close(new[1], first * up * down)
    torch.testing.assert_close(new[0], first * down * down)
    torch.testing.assert_close(new[3], first * down * up)
    torch.testing.assert_close(new[4], first * up * up)


def test_split_does_better_than_keep_when_clusters_empty() -> None:
    x = blobs(2000, 8, 60, spread=0.05)
    start = x[:1] + 1e-4 * torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    kept = spherical_kmeans(x, F.normalize(start, dim=1), AS_PUBLISHED)
    split = spherical_kmeans(x, F.normalize(start, dim=1))
    assert kept.counts_K.min() == 0 < split.counts_K.min()
    assert split.inertia[-1] < 0.5 * kept.inertia[-1]


@pytest.mark.parametrize("run", [spherical_kmeans, euclidean_kmeans])
def test_faiss_backend_finds_the_same(run: Callable[..., Clusters]) -> None:
    pytest.importorskip("faiss")
    x = blobs(3000, 16, 40)
    ours = run(x, 40, KMeansOptions(), seed=1)
    theirs = run(x, 40, KMeansOptions(kmeans_backend="faiss"), seed=1)
    assert (ours.labels_N != theirs.labels_N).float().mean() < 1e-3
    assert abs(ours.inertia[-1] / theirs.inertia[-1] - 1) < 1e-4


def test_missing_faiss_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match=r"--kmeans_backend faiss: faiss cannot be imported .*; pip install faiss-cpu"):
        KMeansOptions(kmeans_backend="faiss")


def test_refuses_bad_rows() -> None:
    x = blobs(20, 4, 4)
    with pytest.raises(UserError, match="21 clusters of 20 images"):
        spherical_kmeans(x, 21)
    with pytest.raises(UserError, match="1 of 20 features are not of unit length"):
        spherical_kmeans(torch.cat([x[:19], 2 * x[19:]]), 3)
    for bad in (torch.nan, torch.inf):
        broken = x.clone()
        broken[4, 1] = bad
        for run in (spherical_kmeans, euclidean_kmeans):
            with pytest.raises(UserError, match="1 of 20 features are not finite"):
                run(broken, 3)
    with pytest.raises(UserError, match="--kmeans_iters 0"):
        KMeansOptions(kmeans_iters=0)


def bad_rows_on_one_rank(rank: int, world_size: int) -> str:
    x = blobs(20, 4, 4)
    with pytest.raises(UserError) as error:
        spherical_kmeans(x * (1 + rank), 3)
    return str(error.value)


def test_all_ranks_refuse_the_bad_rows_of_one() -> None:
    assert all("20 of 40 features are not of unit length" in said for said in run_ranks(bad_rows_on_one_rank, 2))


def test_memory_is_estimated_and_told_of_first(caplog: pytest.LogCaptureFixture) -> None:
    cpu = torch.device("cpu")
    everything = 1_281_167 * 3000 * 4
    assert memory_estimate(1_281_167, 128, 3000, cpu) < everything / 100
    assert memory_estimate(1_281_167, 128, 3000, cpu, "kmeans++") > memory_estimate(1_281_167, 128, 3000, cpu)
    with caplog.at_level(logging.INFO, "clusterssl.cluster.kmeans"):
        spherical_kmeans(blobs(40, 8, 4), 5)
    assert "k-means of 40 x 8 features into 5 clusters: 0 MB on each rank beside its features" in caplog.text


def test_half_precision_around_it_changes_nothing() -> None:
    x = blobs(500, 16, 20)
    with torch.autocast("cpu", torch.bfloat16):
        inside = spherical_kmeans(x, 20)
    assert torch.equal(inside.centroids_KD, spherical_kmeans(x, 20).centroids_KD)
