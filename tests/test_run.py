"""What is split over ranks goes to any other number of ranks."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from clusterssl import dist
from clusterssl.dist import World
from clusterssl.run import Run
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
