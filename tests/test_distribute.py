"""The wrapper that averages gradients: what it need not send, and what it may send in fewer bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clusterssl import dist
from clusterssl.batchnorm import same_on_all_ranks, synchronise
from clusterssl.checkpoint import distribute
from clusterssl.dist import World
from clusterssl.models.build import build_model
from clusterssl.plan.__main__ import Options, plan
from tests.launch import ROOT, TINY
from tests.ranks import run_ranks

STEPS = 6


def build_start() -> nn.Module:
    torch.manual_seed(0)
    return build_model("conv4w4", "small", 16, 8, 12)


def wrapped(rank: int, size: int, mode: str, how: str) -> Any:
    net = synchronise(build_start(), mode, 2, torch.device("cpu"))
    if how == "published":  # as everybody wraps, the oracle
        return DistributedDataParallel(net)
    return distribute(net, World(rank, size), how)


def trained(rank: int, size: int, mode: str, how: str) -> tuple[bool, dict[str, Tensor], list[Tensor]]:
    """Whether buffers are sent, weights and buffers, and the gradient of a layer, after some steps on own images."""
    model = wrapped(rank, size, mode, how)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    images = torch.rand(STEPS, 4 * size, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none=True)
        z_ND, scores_NK = model([images[step].chunk(size)[rank] * (1 + rank)])
        (scores_NK.square().mean() + z_ND[:, 0].mean()).backward()
        optimizer.step()
    state = {name: value.detach().clone() for name, value in model.module.state_dict().items()}
    return model.broadcast_buffers, state, [p.grad.clone() for p in model.parameters()]


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("size", [2, 3])
def test_shared_statistics_stay_the_same_without_being_sent(size: int) -> None:
    ours, published = (run_ranks(trained, size, "pytorch", how) for how in ("none", "published"))
    assert [sent for sent, *_ in ours] == [False] * size and published[0][0]
    for _, state, _ in ours:
        assert equal(state, ours[0][1]) and equal(state, published[0][1])
    before = build_start().state_dict()
    moved = [name for name in before if "running" in name and not torch.equal(before[name], ours[0][1][name])]
    assert len(moved) >= 8, "statistics were to change"


@pytest.mark.parametrize(("mode", "size"), [("none", 2), ("apex", 4)])
def test_statistics_that_differ_are_sent_as_ever(mode: str, size: int) -> None:
    ours, published = (run_ranks(trained, size, mode, how) for how in ("none", "published"))
    assert all(sent for sent, *_ in ours)
    for (_, state, _), (_, expected, _) in zip(ours, published, strict=True):
        assert equal(state, expected)


def test_gradients_in_bf16_are_close_and_the_same_everywhere() -> None:
    exact, rounded = (run_ranks(trained, 2, "pytorch", how) for how in ("none", "bf16"))
    assert equal(rounded[0][1], rounded[1][1]) and not equal(rounded[0][1], exact[0][1])
    start = build_start().state_dict()
    moved = off = 0.0
    for name, expected in exact[0][1].items():
        if expected.is_floating_point():
            moved += float((expected - start[name]).square().sum())
            off += float((rounded[0][1][name] - expected).square().sum())
    assert 0 < off < 0.02**2 * moved
    for grad in rounded[0][2]:
        assert torch.equal(grad, grad.bfloat16().float()), "what was sent had 8 bits"


def in_groups(rank: int, size: int) -> tuple[bool, bool]:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    in_pairs = nn.SyncBatchNorm.convert_sync_batchnorm(net, dist.subgroup(2))
    return same_on_all_ranks(in_pairs), same_on_all_ranks(synchronise(net, "apex", 2, torch.device("cpu")))


def test_who_keeps_buffers_the_same() -> None:
    def net(*more: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), *more)

    of_torch = nn.SyncBatchNorm.convert_sync_batchnorm
    assert same_on_all_ranks(of_torch(net())) and not same_on_all_ranks(net())
    assert not same_on_all_ranks(of_torch(net(nn.InstanceNorm2d(4, track_running_stats=True))))
    assert same_on_all_ranks(nn.Linear(2, 2)), "there are none"
    assert run_ranks(in_groups, 4) == [(False, False)] * 4


def test_a_plan_counts_what_is_sent() -> None:
    def sent(part: str, *flags: str) -> int:
        options = Options(nodes=1, ngpus=4, num_images=1000)
        found = plan(options, ROOT / "main_swav.py", [*TINY, "--batch_size", "8", "--device", "auto", *flags])
        return sum(message.nbytes for message in found.rehearsed.messages if message.part == part)

    assert 2 * sent("gradients", "--grad_compression", "bf16") == sent("gradients") > 0
    assert sent("buffers of the network") == 0 < sent("buffers of the network", "--sync_bn", "none")
