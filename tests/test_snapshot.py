"""Copies that training cannot change any more."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from clusterssl.snapshot import Snapshots


def state() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model with BatchNorm, in channels-last order, and an optimiser with momentum."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    step(net, optimizer)
    return net, optimizer


def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    net(torch.randn(2, 3, 8, 8)).square().sum().backward()
    optimizer.step()


def tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else []
    return [tensor for one in inner for tensor in tensors(one)]


def test_a_copy_stays_what_the_state_was() -> None:
    net, optimizer = state()
    snapshots, listed = Snapshots(), [1, 2]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    momenta = [optimizer.state[p]["momentum_buffer"].clone() for p in net.parameters()]
    copy = snapshots.take({"model": net.state_dict(), "optimizer": optimizer.state_dict(), "more": (listed, "text")})
    snapshots.wait()
    step(net, optimizer)
    listed.append(3)
    optimizer.param_groups[0]["lr"] = 7.0
    for name, value in before.items():
        ours = copy["model"][name]
        assert torch.equal(ours, value) and (ours.dtype, ours.stride()) == (value.dtype, value.stride())
        assert not torch.equal(ours, net.state_dict()[name]), name
    for ours, value in zip(tensors(copy["optimizer"]["state"]), momenta, strict=True):
        assert torch.equal(ours, value)
    assert copy["optimizer"]["param_groups"][0]["lr"] == 0.1 and copy["more"] == ([1, 2], "text")
    assert not any(tensor.requires_grad for tensor in tensors(copy))


def test_later_copies_use_the_memory_of_the_first() -> None:
    net, optimizer = state()
    snapshots = Snapshots()
    places = [{tensor.data_ptr() for tensor in tensors(snapshots.take(net.state_dict()))}]
    step(net, optimizer)
    again = snapshots.take(net.state_dict())
    assert {tensor.data_ptr() for tensor in tensors(again)} == places[0]
    assert all(torch.equal(again[name], value) for name, value in net.state_dict().items())
    other = snapshots.take({"a": torch.ones(2, dtype=torch.float64), "b": torch.arange(3)})
    assert torch.equal(other["a"], torch.ones(2, dtype=torch.float64)) and torch.equal(other["b"], torch.arange(3))


def test_tensors_that_share_memory_get_copies_of_their_own() -> None:
    whole = torch.arange(6.0)
    copy = Snapshots().take({"whole": whole, "part": whole[2:4], "turned": whole.view(2, 3).T})
    whole.zero_()
    assert copy["part"].tolist() == [2, 3] and copy["turned"].tolist() == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.gpu
def test_a_copy_from_the_gpu_is_of_the_moment_it_was_taken() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    value = torch.ones(50_000_000, device="cuda")
    snapshots = Snapshots()
    for number in range(3):
        copy = snapshots.take([value])
        value += 1
        snapshots.wait()
        assert copy[0].is_pinned() and torch.equal(copy[0], torch.full((50_000_000,), number + 1.0))
