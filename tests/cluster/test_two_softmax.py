"""The two-softmax loss against golden files and against its formula over the whole batch."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch
import torch.distributed as torch_dist
from torch import Tensor

from clusterssl.cluster.two_softmax import cross_prediction, two_softmax
from tests.golden_files import Golden
from tests.ranks import run_ranks

GOLDEN = Golden("selfclassifier_loss")
SIZES = (5, 9)


def logits_of(case: str, end: str, dtype: torch.dtype) -> list[Tensor]:
    """[V, B, K] of each classifier."""
    given = GOLDEN.params(case)
    names = [[f"{case}_x_c{c}_v{v}{end}" for v in range(given["views"])] for c in range(len(given["K"]))]
    return [torch.stack([torch.from_numpy(GOLDEN[name]).to(dtype) for name in views]) for views in names]


def difference(rank: int, world_size: int, case: str, dtype: torch.dtype) -> float:
    """Of loss and gradient to the golden ones on this rank; the gradient's is relative to its largest entry."""
    given, end = GOLDEN.params(case), f"_r{rank}" if world_size > 1 else ""
    logits = [x.requires_grad_() for x in logits_of(case, end, dtype)]
    loss = cross_prediction(two_softmax(logits, given["row"], given["col"], given["eps"]))
    loss.backward()
    worst = largest = 0.0
    for c, x in enumerate(logits):
        golden = torch.stack([torch.from_numpy(GOLDEN[f"{case}_grad_c{c}_v{v}{end}"]) for v in range(len(x))])
        assert x.grad is not None
        worst = max(worst, float((x.grad - golden).abs().max()))
        largest = max(largest, float(golden.abs().max()))
    return max(abs(loss.item() - float(GOLDEN[f"{case}_loss{end}"])), worst / largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", ["two_views", "multi", "other_tau"])
def test_equals_golden(case: str, dtype: torch.dtype) -> None:
    assert difference(0, 1, case, dtype) < 1e-6


def test_equals_golden_on_two_ranks() -> None:
    for found in run_ranks(difference, 2, "two_ranks", torch.float32):
        assert found < 1e-6


def test_every_golden_case_is_compared() -> None:
    cases = {name.removesuffix("_params") for name in GOLDEN.names() if name.endswith("_params")}
    assert cases == {"two_views", "multi", "other_tau", "two_ranks"}


def whole_batch_loss(logits: list[Tensor], row_tau: float, col_tau: float, eps: float) -> Tensor:
    """The formula, pair by pair, on logits [V, N, K] of all images."""
    terms = []
    for x_VNK in logits:
        n, k = x_VNK.shape[1:]
        for i, j in permutations(range(len(x_VNK)), 2):
            if min(i, j) < 2:
                over_batch = torch.softmax(x_VNK[i] / col_tau, dim=0)
                target = over_batch / over_batch.sum(1, keepdim=True)
                over_classes = torch.softmax(x_VNK[j] / row_tau, dim=1)
                prediction = over_classes / over_classes.sum(0)
                terms.append(-(target * torch.log(n / k * prediction + eps)).sum(1).mean())
    return torch.stack(terms).mean()


def all_logits(views: int, images: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.rand(views, images, k, generator=generator, dtype=torch.float64) * 2 - 1 for k in SIZES]


def on_a_rank(rank: int, world_size: int, views: int) -> tuple[float, list[Tensor], int]:
    """Loss, gradients, and how many numbers this rank sent."""
    sent = 0
    really = torch_dist.all_reduce

    def counting(x: Tensor, *args: object, **more: object) -> object:
        nonlocal sent
        sent += x.numel()
        return really(x, *args, **more)

    torch_dist.all_reduce = counting
    own = [x.chunk(world_size, dim=1)[rank].clone().requires_grad_() for x in all_logits(views, 12)]
    loss = cross_prediction(two_softmax(own, 0.1, 0.05))
    loss.backward()
    torch_dist.all_reduce = really
    return loss.item(), [x.grad for x in own if x.grad is not None], sent


@pytest.mark.parametrize(("world_size", "views"), [(1, 2), (1, 5), (3, 5)])
def test_ranks_together_equal_the_whole_batch(world_size: int, views: int) -> None:
    logits = [x.requires_grad_() for x in all_logits(views, 12)]
    expected = whole_batch_loss(logits, 0.1, 0.05, 1e-12)
    expected.backward()
    parts = [on_a_rank(0, 1, views)] if world_size == 1 else run_ranks(on_a_rank, world_size, views)
    assert sum(part[0] for part in parts) / world_size == pytest.approx(expected.item(), abs=1e-12)
    for c, x in enumerate(logits):
        together = torch.cat([part[1][c] for part in parts], dim=1)
        torch.testing.assert_close(together / world_size, x.grad, rtol=0, atol=1e-12)
    vectors = 0 if world_size == 1 else 5  # one maximum, two sums, and the gradients of the sums
    assert [part[2] for part in parts] == [vectors * views * sum(SIZES)] * world_size


def test_the_gradient_is_that_of_the_formula() -> None:
    logits = [0.3 * x.requires_grad_() for x in all_logits(3, 4)]
    assert torch.autograd.gradcheck(lambda *x: cross_prediction(two_softmax(x)), logits)


def test_guessing_costs_ln_k_and_knowing_costs_nothing() -> None:
    guess = torch.zeros(4, 12, 6)
    assert cross_prediction(two_softmax([guess])).item() == pytest.approx(math.log(6), abs=1e-5)
    known = torch.eye(6).repeat(2, 1).expand(4, 12, 6)
    assert cross_prediction(two_softmax([50 * known])).item() == pytest.approx(0, abs=1e-5)
    one_class = torch.eye(6)[:1].repeat(12, 1).expand(4, 12, 6)
    assert cross_prediction(two_softmax([one_class])).item() == pytest.approx(math.log(6), abs=1e-5)


def test_autocast_does_not_reach_it() -> None:
    halves = [x.to(torch.bfloat16) for x in all_logits(4, 8)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = cross_prediction(two_softmax(halves))
    assert inside.dtype == torch.float32
    assert torch.equal(inside, cross_prediction(two_softmax([x.float() for x in halves])))


@pytest.mark.parametrize("size", [1e3, 1e8])
def test_finite_on_extreme_logits(size: float) -> None:
    logits = [(size * x.float()).requires_grad_() for x in all_logits(4, 8)]
    loss = cross_prediction(two_softmax(logits))
    loss.backward()
    assert torch.isfinite(loss) and all(x.grad is not None and torch.isfinite(x.grad).all() for x in logits)
