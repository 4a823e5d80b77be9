from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clusterssl.cluster import nearest
from clusterssl.cluster.kmeans import Clusters, KMeansOptions, euclidean_kmeans, memory_estimate, spherical_kmeans
from clusterssl.cluster.memory import label_table
from clusterssl.errors import UserError
from tests.cluster.blobs import blobs
from tests.golden_files import Golden
from tests.ranks import run_ranks

GOLDEN = Golden("dcv2_cluster_memory")
AS_PUBLISHED = KMeansOptions(kmeans_empty="keep")


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


def test_of_equal_scores_the_first_centroid_wins() -> None:
    x = torch.eye(5).repeat(60, 1)
    for run in (spherical_kmeans, euclidean_kmeans):
        found = run(x, torch.eye(5).repeat(4, 1), AS_PUBLISHED)
        assert torch.equal(found.labels_N, torch.arange(5).repeat(60))


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


@pytest.mark.parametrize("run", [spherical_kmeans, euclidean_kmeans])
def test_does_not_depend_on_the_cores(run: Callable[..., Clusters]) -> None:
    x, before, found = blobs(20_001, 16, 50), torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(run(x, 60, KMeansOptions(kmeans_iters=3)))
    torch.set_num_threads(before)
    assert torch.equal(found[0].labels_N, found[1].labels_N)
    torch.testing.assert_close(found[0].centroids_KD, found[1].centroids_KD, rtol=0, atol=1e-6)
    np.testing.assert_allclose(found[0].inertia, found[1].inertia, rtol=1e-6)


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
    assert 1_281_167 * 100 < memory_estimate(1_281_167, 128, 3000, cpu) < everything / 20
    assert memory_estimate(1_281_167, 128, 3000, cpu, "kmeans++") > memory_estimate(1_281_167, 128, 3000, cpu)
    with caplog.at_level(logging.INFO, "clusterssl.cluster.kmeans"):
        for clusters in (5, 5, 6):
            spherical_kmeans(blobs(41, 9, 4), clusters)
    for clusters in (5, 6):
        assert caplog.text.count(f"k-means of 41 x 9 features into {clusters} clusters: needs ") == 1
    assert "MB on each rank beside its features" in caplog.text


def test_half_precision_around_it_changes_nothing() -> None:
    x = blobs(500, 16, 20)
    with torch.autocast("cpu", torch.bfloat16):
        inside = spherical_kmeans(x, 20)
    assert torch.equal(inside.centroids_KD, spherical_kmeans(x, 20).centroids_KD)
