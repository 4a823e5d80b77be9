from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, logsumexp

from clusterssl.cluster.transport import Plan, TransportOptions, dealt, equal_labels, transport
from clusterssl.errors import UserError
from tests.golden_files import Golden
from tests.ranks import run_ranks

GOLDEN = Golden("sela_sk")
CASES = ["k10_n200", "k10_n200_l10", "k100_n5000", "k7_n500_uneven", "cifar_k12_n400"]
PUBLISHED = TransportOptions(sinkhorn_solver="published")


def golden_logits(case: str) -> torch.Tensor:
    p = GOLDEN.params(case)
    logits = np.random.RandomState(p["seed"]).standard_normal((p["N"], p["K"])) * p["scale"]
    np.testing.assert_array_equal(logits[:4, :5], GOLDEN[f"{case}_logits_head"])
    return torch.from_numpy(logits)


def golden_tol(case: str) -> float:
    return 0.01 if case.startswith("cifar") else 0.1


def peaked(images: int, clusters: int, *, scale: float = 0.4, height: float = 6.0, seed: int = 2) -> torch.Tensor:
    """Logits of a network that is sure of itself, with clusters of very unequal sizes."""
    random = np.random.RandomState(seed)
    logits = random.standard_normal((images, clusters)) * scale
    size = 1 / np.arange(1, clusters + 1) ** 0.7
    best = random.choice(clusters, images, p=size / size.sum())
    logits[np.arange(images), best] += height * random.uniform(0.3, 1, images)
    return torch.from_numpy(logits)


def reference(logits: np.ndarray, sharpness: float, tol: float = 1e-7, most: int = 20_000) -> np.ndarray:
    """The balanced plan N Q in float64, by Sinkhorn's iteration in the log domain until the clusters are equal."""
    log_m = sharpness * logits.astype(np.float64)
    log_r = np.zeros(logits.shape[1])
    for _ in range(most):
        log_c = -logsumexp(log_m + log_r, axis=1, keepdims=True)
        log_s = logsumexp(log_m + log_r + log_c, axis=0) - np.log(len(logits) / logits.shape[1])
        log_r = log_r - log_s
        if np.abs(log_s).max() < tol:
            break
    return np.exp(log_m + log_r - logsumexp(log_m + log_r, axis=1, keepdims=True))


def column_sums(logits: torch.Tensor, plan: Plan, sharpness: float) -> np.ndarray:
    """Images of each cluster in the plan, over N/K, recomputed from its potentials."""
    rows = torch.softmax(sharpness * logits.double() + plan.potentials_K, 1)
    return (rows.sum(0) * logits.shape[1] / logits.shape[0]).numpy()


@pytest.mark.parametrize("case", CASES)
def test_published_iteration_is_exact(case: str) -> None:
    lamb = GOLDEN.params(case)["lamb"]
    options = TransportOptions(sinkhorn_solver="published", sinkhorn_tol=golden_tol(case))
    plan = transport(golden_logits(case), sharpness=lamb, options=options)
    np.testing.assert_array_equal(plan.labels_N.numpy(), GOLDEN[f"{case}_labels"])
    assert plan.iterations == int(GOLDEN[f"{case}_iterations"])
    if f"{case}_final_error" in GOLDEN:
        assert plan.error == pytest.approx(float(GOLDEN[f"{case}_final_error"]), rel=1e-6)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_quasi_newton_gives_the_published_labels(case: str, dtype: torch.dtype | None) -> None:
    lamb, logits = GOLDEN.params(case)["lamb"], golden_logits(case)
    options = TransportOptions(sinkhorn_tol=golden_tol(case))
    plan = transport(logits, sharpness=lamb, options=options, dtype=dtype)
    np.testing.assert_array_equal(plan.labels_N.numpy(), GOLDEN[f"{case}_labels"])
    assert plan.converged and plan.passes <= int(GOLDEN[f"{case}_iterations"])
    assert plan.imbalance <= 0.01
    assert np.abs(column_sums(logits, plan, lamb) - 1).max() <= 0.0101


def test_heads_on_features() -> None:
    for head, (expected, iterations) in enumerate(zip(GOLDEN["heads_labels"], GOLDEN["heads_iterations"], strict=True)):
        inputs = [torch.from_numpy(GOLDEN[f"heads_{x}"]) for x in ("features", f"w{head}", f"b{head}")]
        published, ours = (transport(*inputs, sharpness=25.0, options=one) for one in (PUBLISHED, None))
        np.testing.assert_array_equal(published.labels_N.numpy(), expected)
        assert published.iterations == iterations
        np.testing.assert_array_equal(ours.labels_N.numpy(), expected)


def test_initial_labels() -> None:
    p = GOLDEN.params("init")
    random = np.random.RandomState(p["seed"])
    published = [dealt(random.permutation(p["N"]), p["K"]) for _ in range(p["hc"])]
    np.testing.assert_array_equal(np.stack(published), GOLDEN["init_labels"])
    ours = equal_labels(7, 50, 8, 3)
    assert ours.dtype == torch.int32
    assert all(sorted(np.bincount(row).tolist()) == [6] * 6 + [7] * 2 for row in ours.numpy())
    assert not torch.equal(ours[0], ours[1])
    assert torch.equal(ours, equal_labels(7, 50, 8, 3)) and not torch.equal(ours, equal_labels(8, 50, 8, 3))


@pytest.mark.parametrize(("sharpness", "height"), [(3.0, 0.0), (3.0, 6.0), (25.0, 0.0), (25.0, 3.0), (250.0, 0.0)])
def test_float32_plan_equals_the_float64_reference(sharpness: float, height: float) -> None:
    logits = peaked(600, 12, height=height)
    expected = reference(logits.numpy(), sharpness)
    plan = transport(
        logits.float(), sharpness=sharpness, options=TransportOptions(sinkhorn_tol=1e-3), dtype=torch.float32
    )
    ours = torch.softmax(sharpness * logits + plan.potentials_K, 1).numpy()
    np.testing.assert_allclose(ours, expected, atol=3e-3)
    margin = np.sort(expected, 1)[:, -1] - np.sort(expected, 1)[:, -2]
    clear = margin > 1e-2
    np.testing.assert_array_equal(plan.labels_N.numpy()[clear], expected.argmax(1)[clear])
    assert (plan.labels_N.numpy() == expected.argmax(1)).mean() >= 0.998


def test_float32_agrees_with_the_published_rule_on_999_of_1000_labels() -> None:
    for logits in (peaked(4000, 40), torch.from_numpy(np.random.RandomState(1).standard_normal((4000, 400)))):
        expected = transport(logits, sharpness=25, options=PUBLISHED)
        ours = transport(logits.float(), sharpness=25, dtype=torch.float32)
        assert (ours.labels_N == expected.labels_N).double().mean() >= 0.999
        assert ours.passes < expected.passes / 2


def test_what_underflows_in_float64_is_solved_in_float32() -> None:
    logits = peaked(2000, 20, scale=1.0)
    logits[:, 7] -= 60  # far below all other clusters for every image
    assert np.exp(25 * log_softmax(logits.numpy(), axis=1))[:, 7].max() == 0
    plan = transport(logits.float(), sharpness=25, dtype=torch.float32)
    expected = reference(logits.numpy(), 25, tol=1e-5, most=20_000).argmax(1)
    assert torch.isfinite(plan.potentials_K).all()
    assert plan.imbalance <= 0.01 and np.abs(column_sums(logits, plan, 25) - 1).max() <= 0.02
    assert (plan.labels_N.numpy() == expected).mean() >= 0.998


def test_streamed_equals_cached() -> None:
    random = torch.Generator().manual_seed(0)
    features, weight, bias = (torch.randn(*shape, generator=random) for shape in ((3000, 16), (400, 16), (400,)))
    cached, streamed = (
        transport(
            features, weight, bias, sharpness=20.0, options=TransportOptions(transport_cache_gb=gb), dtype=torch.float32
        )
        for gb in (1.0, 0.0)
    )
    dense = transport(features @ weight.T + bias, sharpness=20.0, dtype=torch.float32)
    assert torch.equal(cached.labels_N, streamed.labels_N)
    assert (cached.labels_N == dense.labels_N).double().mean() >= 0.999


def test_a_start_changes_the_passes_but_not_the_plan() -> None:
    logits = peaked(3000, 30)
    cold = transport(logits, sharpness=25.0, dtype=torch.float64)
    warm = transport(logits + 0.001, sharpness=25.0, dtype=torch.float64, start_K=cold.potentials_K)
    assert torch.equal(cold.labels_N, warm.labels_N)
    assert warm.passes < cold.passes / 3


def test_fixed_number_of_published_iterations() -> None:
    logits = golden_logits("k10_n200")
    plan = transport(logits, sharpness=20.0, options=TransportOptions(sinkhorn_iterations=3))
    m, c = np.exp(20 * log_softmax(logits.numpy(), axis=1)), np.full(200, 1 / 200)
    for _ in range(3):
        r = 1 / (10 * (c @ m))
        c = 1 / (200 * (m @ r))
    np.testing.assert_array_equal(plan.labels_N.numpy(), (m * r).argmax(1))
    assert plan.iterations == 3


def test_the_cap_warns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        plan = transport(peaked(3000, 30), sharpness=25.0, options=TransportOptions(sinkhorn_max_iterations=5))
    assert (
        not plan.converged
        and plan.passes <= 8
        and "stopped after" in caplog.text
        and "--sinkhorn_max_iterations" in caplog.text
    )


@pytest.mark.parametrize(("images", "clusters"), [(1000, 10), (1003, 10), (200, 200), (300, 13)])
def test_equal_sizes_move_few_images_little(images: int, clusters: int) -> None:
    logits = peaked(images, clusters)
    plain = transport(logits, sharpness=25.0)
    even = transport(logits, sharpness=25.0, options=TransportOptions(equal_labels=True))
    counts = np.bincount(even.labels_N, minlength=clusters)
    assert counts.min() == images // clusters and counts.max() == -(-images // clusters)
    before = np.bincount(plain.labels_N, minlength=clusters)
    moved = int((plain.labels_N != even.labels_N).sum())
    assert moved <= np.abs(before - images / clusters).sum()


def shares_of_ranks(rank: int, world_size: int, cases: list[tuple[torch.dtype, TransportOptions]]) -> list[Plan]:
    random = torch.Generator().manual_seed(3)
    features, weight, bias = (torch.randn(*shape, generator=random).double() for shape in ((1501, 8), (60, 8), (60,)))
    first, end = rank * 1501 // world_size, (rank + 1) * 1501 // world_size
    mine = features[first:end] if world_size < 4 or rank else features[:0]
    mine = torch.cat([features[: 1501 // 4], mine]) if world_size == 4 and rank == 1 else mine
    return [transport(mine, weight, bias, sharpness=5.0, options=one, dtype=dtype) for dtype, one in cases]


@pytest.mark.parametrize("world_size", [2, 4])
def test_any_number_of_ranks_gives_the_same_labels(world_size: int) -> None:
    cases = [
        (torch.float64, TransportOptions()),
        (torch.float64, TransportOptions(equal_labels=True)),
        (torch.float64, TransportOptions(sinkhorn_iterations=30)),
        (torch.float32, TransportOptions()),
    ]
    alone = shares_of_ranks(0, 1, cases)
    together = run_ranks(shares_of_ranks, world_size, cases)  # of four, the first holds no image
    for number, one in enumerate(alone):
        labels = torch.cat([plans[number].labels_N for plans in together])
        assert torch.equal(labels, one.labels_N)
        for plans in together:
            assert torch.equal(plans[number].potentials_K, together[0][number].potentials_K)
            torch.testing.assert_close(plans[number].potentials_K, one.potentials_K, rtol=0, atol=1e-3)


def test_half_precision_features_and_autocast() -> None:
    logits = peaked(3000, 30).to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = transport(logits, torch.eye(30), sharpness=25.0)
    assert torch.equal(half.labels_N, transport(logits.float(), sharpness=25.0).labels_N)


@pytest.mark.parametrize(
    ("features", "weight", "words"),
    [
        (torch.zeros(5, 8), None, "8 clusters of 5 images"),
        (torch.full((9, 3), torch.nan), None, "not finite"),
        (torch.zeros(9, 3), torch.full((2, 3), torch.inf), "not finite"),
    ],
)
def test_bad_input(features: torch.Tensor, weight: torch.Tensor | None, words: str) -> None:
    with pytest.raises(UserError, match=words):
        transport(features, weight, sharpness=25.0)
    with pytest.raises(UserError, match="sinkhorn_tol"):
        TransportOptions(sinkhorn_tol=0.0)


def test_as_many_clusters_as_images_and_constant_logits() -> None:
    plan = transport(torch.zeros(6, 3), sharpness=25.0, options=TransportOptions(equal_labels=True))
    assert np.bincount(plan.labels_N).tolist() == [2, 2, 2]
    shuffled = torch.eye(8)[torch.randperm(8, generator=torch.Generator().manual_seed(0))]
    assert sorted(transport(shuffled, sharpness=25.0).labels_N.tolist()) == list(range(8))
