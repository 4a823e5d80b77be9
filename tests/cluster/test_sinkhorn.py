from __future__ import annotations

import numpy as np
import pytest
import torch

from clusterssl.cluster import sinkhorn as module
from clusterssl.cluster.sinkhorn import sinkhorn
from tests.golden_files import Golden
from tests.ranks import run_ranks

GOLDEN = Golden("swav_sinkhorn")


def reference(scores: np.ndarray, epsilon: float, iterations: int) -> np.ndarray:
    """Equations 3 to 5 of the SwAV paper in float64, in the log domain, on all rows at once."""
    log_q = scores.astype(np.float64).T / epsilon
    log_q -= np.logaddexp.reduce(log_q.ravel())
    for _ in range(iterations):
        log_q -= np.logaddexp.reduce(log_q, axis=1, keepdims=True) + np.log(log_q.shape[0])
        log_q -= np.logaddexp.reduce(log_q, axis=0, keepdims=True) + np.log(log_q.shape[1])
    return np.exp(log_q + np.log(log_q.shape[1])).T


def cosines(n: int, k: int, dim: int = 16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    z, c = torch.randn(n, dim, generator=generator), torch.randn(k, dim, generator=generator)
    return torch.nn.functional.normalize(z) @ torch.nn.functional.normalize(c).T


@pytest.mark.parametrize("key", [key for key in GOLDEN.names() if key.startswith("c") and "_q_" in key])
def test_equals_the_published_formula(key: str) -> None:
    case, _, dtype, eps, iterations = key.split("_")
    scores = torch.from_numpy(GOLDEN[f"{case}_scores_{dtype}"])
    ours = sinkhorn(scores, float(eps[3:]), int(iterations[2:]))
    torch.testing.assert_close(ours, torch.from_numpy(GOLDEN[key]), rtol=0, atol=1e-6 if dtype == "f4" else 1e-12)


def two_ranks_golden(rank: int, world_size: int) -> list[float]:
    errors = []
    for key in GOLDEN.names():
        if key.startswith("w") and "_q_" in key and key.endswith(f"_r{rank}"):
            case, _, eps, iterations, _ = key.split("_")
            scores = torch.from_numpy(GOLDEN[f"{case}_scores_r{rank}"])
            ours = sinkhorn(scores, float(eps[3:]), int(iterations[2:]), bound=1.0)
            assert torch.isfinite(ours).all()
            errors.append(float((ours - torch.from_numpy(GOLDEN[key])).abs().max()))
    return errors


def test_equals_the_published_two_process_runs() -> None:
    errors = run_ranks(two_ranks_golden, 2)
    assert len(errors[0]) == len(errors[1]) == 12
    assert max(errors[0] + errors[1]) < 1e-6


@pytest.mark.parametrize("epsilon", [0.05, 0.03, 0.011, 0.004])
@pytest.mark.parametrize("shape", [(64, 10), (30, 100), (1, 5), (257, 33)])
def test_equals_the_float64_log_domain_reference(epsilon: float, shape: tuple[int, int]) -> None:
    scores = cosines(*shape)
    expected = torch.from_numpy(reference(scores.numpy(), epsilon, 3)).float()
    # Scores of 24 bits divided by epsilon carry an error of 1e-7 / epsilon into the exponent.
    torch.testing.assert_close(sinkhorn(scores, epsilon, 3), expected, rtol=0, atol=max(1e-6, 2e-7 / epsilon))
    in_double = sinkhorn(scores.double(), epsilon, 3)
    torch.testing.assert_close(in_double.numpy(), reference(scores.numpy(), epsilon, 3), rtol=0, atol=1e-10)


def test_both_paths_agree_where_both_are_valid() -> None:
    scores = cosines(50, 20).double()
    scaled = torch.empty_like(scores[None])
    module._by_scaling(scores[None], 1.0, 0.05, 5, scaled)
    torch.testing.assert_close(scaled[0], module._in_log_domain(scores, 0.05, 5))


@pytest.mark.parametrize("epsilon", [0.05, 0.004])
@pytest.mark.parametrize("bound", [None, 1.0])
def test_several_problems_at_once_equal_each_alone(epsilon: float, bound: float | None) -> None:
    problems = [cosines(60, 20, seed=seed) for seed in range(3)]
    together = sinkhorn(torch.stack(problems), epsilon, 3, bound=bound)
    for q, scores in zip(together, problems, strict=True):
        torch.testing.assert_close(q, sinkhorn(scores, epsilon, 3, bound=bound), rtol=0, atol=1e-6)


def test_scores_are_kept_unless_they_may_be_overwritten() -> None:
    scores = cosines(40, 12)
    given = scores.clone()
    expected = sinkhorn(given, 0.05, 3, bound=1.0)
    assert torch.equal(given, scores)
    assert torch.equal(sinkhorn(given, 0.05, 3, bound=1.0, overwrite=True), expected)
    half = scores.half()
    torch.testing.assert_close(sinkhorn(half, 0.05, 3, overwrite=True), sinkhorn(half.float(), 0.05, 3))
    assert torch.equal(half, scores.half())


@pytest.mark.parametrize("rows", [1, 7, 100])
def test_blocks_of_rows_change_nothing(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = cosines(100, 20).double()
    expected = reference(scores.numpy(), 0.05, 4)
    monkeypatch.setattr(module, "_CACHED_ELEMENTS", rows * 20)
    assert module._rows_at_a_time(scores) == rows
    np.testing.assert_allclose(sinkhorn(scores, 0.05, 4).numpy(), expected, rtol=0, atol=1e-12)


def test_a_device_that_counts_launches_gets_one_block() -> None:
    assert module._rows_at_a_time(torch.empty(100_000, 3000, device="meta")) == 100_000
    assert module._rows_at_a_time(torch.empty(100_000, 3000)) < 1000


def test_a_common_offset_of_all_scores_changes_nothing() -> None:
    scores = cosines(50, 20).double()
    torch.testing.assert_close(sinkhorn(scores + 1e4, 0.05, 3), sinkhorn(scores, 0.05, 3), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "scores",
    [
        torch.tensor([[1e30, -1e30], [-1e30, 1e30]]),
        torch.tensor([[80.0, 0.0, -80.0]] * 4),
        torch.zeros(6, 3),
        torch.tensor([[1.0, -1.0]] * 5),
        torch.full((4, 4), -1e20),
        cosines(16, 8).half() * 3,
        cosines(16, 8).bfloat16() * 100,
    ],
)
@pytest.mark.parametrize("epsilon", [0.05, 1e-3])
def test_is_finite_and_sums_to_one_on_every_finite_input(scores: torch.Tensor, epsilon: float) -> None:
    q = sinkhorn(scores, epsilon, 3)
    assert q.dtype == torch.float32 and torch.isfinite(q).all()
    torch.testing.assert_close(q.sum(1), torch.ones(len(q)), rtol=0, atol=1e-5)


def test_a_wrong_bound_still_gives_finite_rows() -> None:
    q = sinkhorn(cosines(8, 5) * 1.01, 0.05, 3, bound=1.0)
    assert torch.isfinite(q).all()


def test_computes_in_float32_inside_autocast() -> None:
    scores = cosines(40, 12)
    expected = sinkhorn(scores, 0.05, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sinkhorn(scores, 0.05, 3), expected)


def test_uses_prototypes_equally_after_many_iterations() -> None:
    q = sinkhorn(cosines(200, 10).double(), 0.05, 200)
    torch.testing.assert_close(q.sum(0), torch.full((10,), 20.0, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(2000, 5), (4, 300)])
@pytest.mark.parametrize("iterations", [4, 5, 30, 100])
def test_many_iterations_stay_in_range(shape: tuple[int, int], iterations: int) -> None:
    scores = cosines(*shape)
    ours = sinkhorn(scores, 0.1, iterations)
    np.testing.assert_allclose(ours.numpy(), reference(scores.numpy(), 0.1, iterations), rtol=0, atol=2e-6)


def of_my_rows(rank: int, world_size: int, epsilon: float, bound: float | None) -> torch.Tensor:
    rows = cosines(48, 10).chunk(world_size)[rank]
    return sinkhorn(rows, epsilon, 3, bound=bound)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(("epsilon", "bound"), [(0.05, 1.0), (0.05, None), (0.01, None)])
def test_many_ranks_equal_one(world_size: int, epsilon: float, bound: float | None) -> None:
    parts = run_ranks(of_my_rows, world_size, epsilon, bound)
    torch.testing.assert_close(torch.cat(parts), sinkhorn(cosines(48, 10), epsilon, 3), rtol=0, atol=1e-6)


def count_collectives(rank: int, world_size: int, iterations: int, problems: int) -> list[tuple[int, ...]]:
    import torch.distributed as torch_dist

    sizes: list[tuple[int, ...]] = []
    original = torch_dist.all_reduce

    def spy(x: torch.Tensor, *args: object, **kwargs: object) -> object:
        sizes.append(tuple(x.shape))
        return original(x, *args, **kwargs)

    torch_dist.all_reduce = spy
    try:
        mine = cosines(48, 10).chunk(world_size)[rank]
        sinkhorn(mine if problems == 1 else torch.stack([mine] * problems), 0.05, iterations, bound=1.0)
    finally:
        torch_dist.all_reduce = original
    return sizes


def test_an_iteration_costs_one_all_reduce_of_a_k_vector() -> None:
    assert run_ranks(count_collectives, 2, 4, 1) == [[(10,)] * 4] * 2


def test_several_problems_share_it() -> None:
    assert run_ranks(count_collectives, 2, 4, 3) == [[(30,)] * 4] * 2
