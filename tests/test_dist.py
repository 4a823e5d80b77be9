from __future__ import annotations

import dataclasses

import pytest
import torch

from clusterssl import dist, joining
from clusterssl.batchnorm import CPUSyncBatchNorm, synchronise, unchanged_statistics
from clusterssl.errors import UserError
from clusterssl.rendezvous import find_place, ranks_per_node
from tests.ranks import run_ranks

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
JOB = {"SLURM_JOB_ID": "123456", "SLURM_NTASKS": "20", "SLURM_TASKS_PER_NODE": "10(x2)", "SLURM_PROCID": "0"}
STEP = {**JOB, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "20", "SLURM_PROCID": "13", "SLURM_LOCALID": "3"}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, (0, 1, 0, "alone")),
        (TORCHRUN, (5, 8, 1, "torchrun")),
        (STEP, (13, 20, 3, "srun")),
        ({**STEP, **TORCHRUN}, (5, 8, 1, "torchrun")),
        (JOB, (0, 1, 0, "alone")),
    ],
    ids=["alone", "torchrun", "srun", "torchrun inside srun", "batch script without srun"],
)
def test_place(env: dict[str, str], expected: tuple) -> None:
    assert dataclasses.astuple(find_place(env)) == expected


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, 1),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "4"}, 4),
        (STEP, 10),
        ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "6"}, 6),
        (JOB, 1),
    ],
    ids=["alone", "torchrun", "srun", "another number in this step", "batch script without srun"],
)
def test_ranks_per_node(env: dict[str, str], expected: int) -> None:
    assert ranks_per_node(env) == expected


def test_nodes_of_different_size_have_no_ranks_per_node() -> None:
    with pytest.raises(UserError, match=r"SLURM_TASKS_PER_NODE=8\(x2\),4: nodes differ"):
        ranks_per_node({**STEP, "SLURM_TASKS_PER_NODE": "8(x2),4"})


def test_no_gpu_where_one_is_asked_for() -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    with pytest.raises(UserError, match="--device cuda: no GPU"):
        joining.join(device="cuda")


def test_alone_collectives_change_nothing() -> None:
    x = torch.arange(3.0)
    assert torch.equal(dist.all_reduce_(x.clone()), x) and torch.equal(dist.all_gather_cat(x), x)
    assert dist.broadcast_object("a") == "a" and dist.share(7) == (0, 7) and (dist.rank(), dist.size()) == (0, 1)


def collectives(rank: int, world_size: int) -> dict:
    x = torch.tensor([float(rank), 1.0])
    agreement = dist.Agreement(2)
    seen = [agreement.exchange([int(rank == 1 and step == 1), step]) for step in range(3)]
    return {
        "sum": dist.all_reduce_(x.clone()),
        "mean": dist.all_reduce_(x.clone(), "mean"),
        "max": dist.all_reduce_(x.clone(), "max"),
        "rows": dist.all_gather_cat(torch.full((rank + 1, 2), rank)),
        "equal rows": dist.all_gather_later(torch.arange(6).view(2, 3).T + 10 * rank)(),
        "object": dist.broadcast_object(f"from {rank}"),
        "share": dist.share(10),
        "agreed": [*seen, agreement.finish()],
    }


def test_collectives_over_ranks() -> None:
    answers = run_ranks(collectives, 3)
    for answer in answers:
        assert answer["sum"].tolist() == [3, 3] and answer["mean"].tolist() == [1, 1]
        assert answer["max"].tolist() == [2, 1] and answer["object"] == "from 0"
        assert answer["rows"][:, 0].tolist() == [0, 1, 1, 2, 2, 2]
        assert answer["equal rows"].tolist() == [[i + 10 * r, 3 + i + 10 * r] for r in range(3) for i in range(3)]
        assert answer["agreed"] == [[0, 0], [0, 0], [1, 1], [0, 2]], "one step late, and the same everywhere"
    assert [answer["share"] for answer in answers] == [(0, 3), (3, 6), (6, 10)]


def groups(rank: int, world_size: int) -> dict:
    torch.manual_seed(0)
    x = torch.randn(4, 6, 3, 5, 5, dtype=torch.float64)[rank]
    layer = synchronise(torch.nn.BatchNorm2d(3).double(), "apex", 2, torch.device("cpu"))
    assert isinstance(layer, CPUSyncBatchNorm)
    x.requires_grad_()
    y = layer(x)
    (y * torch.arange(y.numel(), dtype=torch.float64).view_as(y)).sum().backward()
    return {"y": y.detach(), "grad": x.grad, "mean": layer.running_mean, "var": layer.running_var}


def test_batchnorm_in_groups_equals_batchnorm_on_the_group() -> None:
    answers = run_ranks(groups, 4)
    torch.manual_seed(0)
    images = torch.randn(4, 6, 3, 5, 5, dtype=torch.float64)
    for group in (0, 1):
        x = images[2 * group : 2 * group + 2].flatten(0, 1).requires_grad_()
        layer = torch.nn.BatchNorm2d(3).double()
        y = layer(x)
        weight = torch.arange(y.numel() // 2, dtype=torch.float64).view(6, 3, 5, 5).repeat(2, 1, 1, 1)
        (y * weight).sum().backward()
        assert x.grad is not None
        ours = answers[2 * group : 2 * group + 2]
        torch.testing.assert_close(torch.cat([one["y"] for one in ours]), y.detach())
        torch.testing.assert_close(torch.cat([one["grad"] for one in ours]), x.grad, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(ours[0]["mean"], layer.running_mean)
        torch.testing.assert_close(ours[1]["var"], layer.running_var)


def bad_group(rank: int, world_size: int) -> str:
    try:
        dist.subgroup(2)
    except UserError as error:
        return str(error)
    return ""


def test_group_size_must_divide_the_ranks() -> None:
    assert "--syncbn_process_group_size 2 does not divide the 3 processes" in run_ranks(bad_group, 3)[0]


def test_statistics_can_be_left_unchanged() -> None:
    layer = torch.nn.BatchNorm1d(3)
    with unchanged_statistics(layer):
        layer(torch.randn(8, 3))
    assert torch.equal(layer.running_mean, torch.zeros(3)) and int(layer.num_batches_tracked) == 0
