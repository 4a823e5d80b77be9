"""The neighbour queue against golden files and a search by brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from clusterssl.cluster import neighbour_queue
from clusterssl.cluster.neighbour_queue import NeighbourQueue
from clusterssl.errors import UserError
from tests.golden_files import Golden
from tests.ranks import run_ranks

GOLDEN = Golden("nnqueue")
CPU = torch.device("cpu")


@pytest.mark.parametrize("case", ["wraps", "exact"])
def test_follows_the_golden_queue(case: str) -> None:
    given = GOLDEN.params(case)
    queue = NeighbourQueue(given["len"], given["dim"], CPU)
    compared = 0
    for step in range(len(given["push"])):
        get = {k: torch.from_numpy(np.asarray(GOLDEN[f"{case}_{k}"])) for k in (
            f"push{step}_x", f"push{step}_indices", f"after{step}_queue", f"after{step}_indices", f"query{step}_x",
            f"query{step}_indices", f"query{step}_nn")}  # fmt: skip
        queue.push(get[f"push{step}_x"], get[f"push{step}_indices"])
        filled = min(queue.pushed, given["len"])
        assert torch.equal(queue.rows_LD, get[f"after{step}_queue"])
        assert torch.equal(queue.index_L[:filled], get[f"after{step}_indices"][:filled])
        assert queue.full == bool(GOLDEN[f"{case}_after{step}_full"])
        assert queue.pushed % given["len"] == int(GOLDEN[f"{case}_after{step}_ptr"])
        if not queue.full:
            continue
        # The published rule looks at the best two only: the same when at most one of the rows is the image's own.
        own = get[f"query{step}_indices"][:, None] == queue.index_L
        once = own.sum(1) <= 1
        found = queue.nearest(get[f"query{step}_x"], get[f"query{step}_indices"])
        assert torch.equal(found[once], get[f"query{step}_nn"][once])
        compared += int(once.sum())
    assert compared >= 10


def by_brute_force(queue: NeighbourQueue, z_BD: Tensor, index_B: Tensor) -> Tensor:
    rows = []
    for z, index in zip(z_BD.double(), index_B, strict=True):
        others = [row for row, at in zip(queue.rows_LD, queue.index_L, strict=True) if at != index]
        rows.append(max(others, key=lambda row: float(row.double() @ z)))
    return torch.stack(rows)


def filled(length: int, images: int, dtype: torch.dtype = torch.float32) -> NeighbourQueue:
    generator = torch.Generator().manual_seed(3)
    queue = NeighbourQueue(length, 5, CPU, dtype)
    queue.push(torch.randn(length, 5, generator=generator), 7 * torch.arange(length) % images)
    return queue


def test_all_rows_of_the_image_itself_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = filled(40, 8)
    assert all((queue.index_L == i).sum() > 1 for i in range(8))
    z, index = torch.randn(24, 5), torch.arange(24) % 8
    z[:8] = torch.stack([queue.rows_LD[queue.index_L == i][0] for i in range(8)])
    expected = by_brute_force(queue, z, index)
    assert torch.equal(queue.nearest(z, index), expected)
    monkeypatch.setattr(neighbour_queue, "_PRODUCTS", 40 * 5)  # five images at a time
    assert torch.equal(queue.nearest(z, index), expected)


def test_precision_inside_autocast() -> None:
    queue, z = filled(64, 60), torch.randn(16, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = queue.nearest(z, torch.arange(16))
    assert torch.equal(inside, queue.nearest(z, torch.arange(16))) and inside.dtype == torch.float32
    assert queue.nearest(z.to(torch.bfloat16), torch.arange(16)).dtype == torch.bfloat16


def test_a_batch_larger_than_the_queue_leaves_its_last_rows() -> None:
    queue = NeighbourQueue(4, 1, CPU)
    queue.push(torch.arange(3.0)[:, None], torch.arange(3))
    queue.push(torch.arange(3.0, 13.0)[:, None], torch.arange(3, 13))
    assert queue.index_L.tolist() == [12, 9, 10, 11] and queue.full
    one_by_one = NeighbourQueue(4, 1, CPU)
    for i in range(13):
        one_by_one.push(torch.tensor([[float(i)]]), torch.tensor([i]))
    assert torch.equal(one_by_one.rows_LD, queue.rows_LD) and torch.equal(one_by_one.index_L, queue.index_L)


def test_micro_batches_enter_together_with_the_last() -> None:
    queue = NeighbourQueue(8, 1, CPU)
    queue.push(torch.ones(2, 1), torch.arange(2), more=True)
    assert queue.pushed == 0 and (queue.index_L == -1).all()
    queue.push(torch.ones(3, 1), torch.arange(2, 5))
    assert queue.pushed == 5 and queue.index_L.tolist() == [0, 1, 2, 3, 4, -1, -1, -1]


def on_a_rank(rank: int, world_size: int, shares: list[dict], steps: range) -> tuple[Tensor, Tensor, Tensor, dict]:
    """Contents after taking back a share and some pushes that wrap around, a query, and this rank's state."""
    queue = NeighbourQueue(11, 5, CPU)
    if shares:
        queue.load_state_dict({"sharded": shares[rank], "pushed": 6 * steps.start}, num_images=99)
    for step in steps:
        z, index = torch.randn(6, 5, generator=torch.Generator().manual_seed(step)), torch.arange(6) + 6 * step
        queue.push(z.chunk(world_size)[rank], index.chunk(world_size)[rank])
    return queue.rows_LD, queue.index_L, queue.nearest(z, index), queue.state_dict()


def test_ranks_hold_the_queue_of_one_rank_and_continue_it() -> None:
    rows, index, found, state = on_a_rank(0, 1, [], range(4))
    begun = on_a_rank(0, 1, [], range(2))[3]["sharded"]
    shares = [{name: x[slice(*cut)] for name, x in begun.items()} for cut in ((0, 5), (5, 11))]
    parts = run_ranks(on_a_rank, 2, shares, range(2, 4))
    for part in parts:
        assert torch.equal(part[0], rows) and torch.equal(part[1], index) and torch.equal(part[2], found)
        assert part[3]["pushed"] == state["pushed"] == 24
    for name in ("rows", "index"):
        assert torch.equal(torch.cat([part[3]["sharded"][name] for part in parts]), state["sharded"][name])
    assert [len(part[3]["sharded"]["rows"]) for part in parts] == [5, 6]


def test_refuses_the_queue_of_another_dataset_or_size() -> None:
    state = filled(12, 40).state_dict()
    with pytest.raises(UserError, match=r"image number \d+ of a dataset that has 9: it was made from other images"):
        NeighbourQueue(12, 5, CPU).load_state_dict(state, num_images=9)
    with pytest.raises(UserError, match="queue is 12 x 5 and not 16 x 5"):
        NeighbourQueue(16, 5, CPU).load_state_dict(state, num_images=40)
