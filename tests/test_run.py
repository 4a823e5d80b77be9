"""What is split over ranks goes to any other number of ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import main_swav
from clusterssl import dist
from clusterssl import run as run_module
from clusterssl.config import flags
from clusterssl.dist import World
from clusterssl.errors import UserError
from clusterssl.pretrain import FREE
from clusterssl.run import Run
from clusterssl.starts import SILENT
from tests.ranks import run_ranks

ROWS = 11


def save(rank: int, world_size: int, folder: str) -> None:
    first, end = dist.share(ROWS)
    rows = torch.arange(ROWS * 2).view(ROWS, 2)[first:end]
    Path(folder).mkdir(exist_ok=True)
    Run(folder, World(rank, world_size)).save({"kept": 1}, {"rows": rows, "more": rows[:, 0]}, step=3)


def load(rank: int, world_size: int, folder: str) -> dict[str, Tensor]:
    state = Run(folder, World(rank, world_size)).load()
    assert state is not None and state["kept"] == 1
    return state["sharded"]


def test_rows_that_ranks_share_unevenly_are_shared_anew(tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    run_ranks(save, 3, folder)
    for world_size in (1, 2, 3, 4):
        parts = run_ranks(load, world_size, folder)
        whole = torch.arange(ROWS * 2).view(ROWS, 2)
        assert torch.equal(torch.cat([part["rows"] for part in parts]), whole)
        assert torch.equal(torch.cat([part["more"] for part in parts]), whole[:, 0])
        shares = [len(part["rows"]) for part in parts]
        assert shares == [(r + 1) * ROWS // world_size - r * ROWS // world_size for r in range(world_size)]


def test_a_flipped_bit_anywhere_is_found_and_the_previous_checkpoint_used(tmp_path: Path) -> None:
    run = Run(tmp_path, World())
    for step in (3, 4):
        weight = torch.full((300,), float(step))
        run.save({"weight": weight}, {"rows": weight.clone()}, step=step)
    random = np.random.RandomState(0)
    for name in ("checkpoint.pth.tar", "checkpoint.step4.rank0-of-1.pth"):
        path = tmp_path / name
        whole = path.read_bytes()
        path.unlink()  # the previous file may be the same one by another name
        for position in random.randint(len(whole), size=60):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << random.randint(8)
            path.write_bytes(damaged)
            state = Run(tmp_path, World()).load()
            assert state is not None and state["step"] in (3, 4)
            values = torch.cat([state["weight"], state["sharded"]["rows"]])
            assert torch.equal(values, torch.full((600,), float(state["step"]))), position
        path.write_bytes(whole)


def resume_damaged(rank: int, world_size: int, folder: str) -> int:
    run = Run(folder, World(rank, world_size))
    for step in (3, 4):
        run.save({"kept": 1}, {"rows": torch.full((200,), float(step))}, step=step)
    if rank == 1:
        path = Path(folder, "checkpoint.step4.rank1-of-2.pth")
        damaged = bytearray(path.read_bytes())
        damaged[len(damaged) // 2] ^= 4
        path.write_bytes(damaged)
    dist.barrier()
    state = run.load()
    assert state is not None and torch.equal(state["sharded"]["rows"], torch.full((200,), float(state["step"])))
    return state["step"]


def test_a_damaged_part_of_one_rank_sends_all_back(tmp_path: Path) -> None:
    assert run_ranks(resume_damaged, 2, str(tmp_path)) == [3, 3]


def test_a_start_that_was_overtaken_writes_no_checkpoint(tmp_path: Path) -> None:
    """The same command twice, or a rank that wakes after the job was started again, must remove nothing."""
    runs = [Run(tmp_path, World()) for _ in range(2)]
    runs[0].open("swav", {}, {}, frozenset())
    runs[0].save({}, {"rows": torch.zeros(2)}, step=1)
    runs[1].open("swav", {}, {}, frozenset())
    assert (runs[1].load() or {})["step"] == 1
    with pytest.raises(UserError, match="another start of this run has taken over"):
        runs[0].save({}, {"rows": torch.zeros(2)}, step=5)
    runs[1].save({}, {"rows": torch.ones(2)}, step=2)
    state = Run(tmp_path, World()).load() or {}
    assert state["step"] == 2 and state["sharded"]["rows"].tolist() == [1, 1]
    for run in runs:
        run.close()


def read_other_steps(rank: int, world_size: int, folder: str) -> str:
    run_module._WAITS_S = (0, 0.1)
    run = Run(folder, World(rank, world_size))
    run.save({}, {}, step=2)
    if rank == 1:  # as with a cache that is behind
        run._read = lambda path: {"step": 1}  # type: ignore[method-assign]
    try:
        run.load()
    except UserError as error:
        return str(error)
    return "loaded"


def test_ranks_never_go_on_from_different_steps(tmp_path: Path) -> None:
    told = run_ranks(read_other_steps, 2, str(tmp_path))
    assert all("different steps, 1 to 2" in line for line in told), told


def test_flags_that_change_no_result_are_not_named(tmp_path: Path) -> None:
    first = {"base_lr": 0.1, "report": True, "profile": 0, "tensorboard": False, "dump_path": "a", "workers": 4}
    then = {"base_lr": 0.2, "report": False, "profile": 9, "tensorboard": True, "dump_path": "b", "workers": 0}
    for config in (first, then):
        Run(tmp_path, World()).open("swav", config, {}, frozenset())
    told = [line for line in (tmp_path / "train.log").read_text().splitlines() if "differs" in line]
    assert len(told) == 1 and told[0].endswith("--base_lr differs from the first start: was 0.1, is now 0.2")


def test_what_is_not_named_may_differ() -> None:
    known = {flag.name for flag in flags(main_swav.Config())}
    assert FREE & known | {"checkpoint_every"} >= SILENT
