"""The ranks of a run: who am I, and collectives that do nothing for a process alone; `joining` has them meet."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook  # noqa: F401

from clusterssl.errors import DataGone, Stopped, UserError
from clusterssl.rendezvous import ranks_per_node
from clusterssl.rollcall import Note

T = TypeVar("T")

_OPS = {"sum": torch_dist.ReduceOp.SUM, "max": torch_dist.ReduceOp.MAX, "min": torch_dist.ReduceOp.MIN}


@dataclass(frozen=True)
class World:
    """Place of this process among all processes of the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")
    launcher: str = "alone"
    notes: tuple[Note, ...] = ()
    """what joining the others brought to light, to be logged once"""

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs and shared files."""
        return self.rank == 0


def leave() -> None:
    """Leave the process group, if there is one."""
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()


@contextmanager
def rehearsal(ranks: int) -> Iterator[None]:
    """Inside the block this process is rank 0 of so many that do not exist: collectives change and send nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend "fake"

    if ranks > 1:
        torch_dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        leave()


def rank() -> int:
    """Rank of this process; 0 alone."""
    return torch_dist.get_rank() if torch_dist.is_initialized() else 0


def size() -> int:
    """Number of processes; 1 alone."""
    return torch_dist.get_world_size() if torch_dist.is_initialized() else 1


def local_size() -> int:
    """Processes of this run on this machine, as far as the launcher says; 1 alone."""
    try:
        return ranks_per_node(dict(os.environ))
    except UserError:
        return 1


def share(total: int) -> tuple[int, int]:
    """Bounds (start, stop) of this rank's contiguous share of `total` rows; shares differ by one row at most."""
    return rank() * total // size(), (rank() + 1) * total // size()


def all_reduce_(x: Tensor, op: str = "sum") -> Tensor:
    """Combine `x` over all ranks in place and return it. `op`: "sum", "mean", "max" or "min"."""
    if size() == 1:
        return x
    torch_dist.all_reduce(x, op=_OPS["sum" if op == "mean" else op])
    return x.div_(size()) if op == "mean" else x


def all_gather_cat(x: Tensor) -> Tensor:
    """Concatenate the rows of all ranks in rank order; ranks may hold different numbers of them."""
    if size() == 1:
        return x
    numbers: list[int] = all_gather_later(torch.tensor([x.shape[0]], device=x.device))().tolist()
    padded = torch.cat([x, x.new_zeros(max(numbers) - len(x), *x.shape[1:])])
    parts = all_gather_later(padded)().unflatten(0, (len(numbers), max(numbers)))
    return torch.cat([part[:number] for part, number in zip(parts, numbers, strict=True)])


def all_gather_later(x: Tensor) -> Callable[[], Tensor]:
    """Begin to concatenate the rows of all ranks, equally many each; what is returned waits for them and gives them."""
    if size() == 1:
        return lambda: x
    rows = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(size())]
    work = torch_dist.all_gather(rows, x.contiguous(), async_op=True)

    def arrived() -> Tensor:
        work.wait()
        return torch.cat(rows)

    return arrived


def broadcast_(x: Tensor, src: int = 0) -> Tensor:
    """Overwrite `x` on all ranks by that of rank `src`."""
    if size() > 1:
        torch_dist.broadcast(x, src)
    return x


def broadcast_object(value: T, src: int = 0) -> T:
    """The small Python value that rank `src` holds."""
    box: list[Any] = [value]
    if size() > 1:
        torch_dist.broadcast_object_list(box, src)
    return box[0]


def gather_objects(value: T) -> list[T]:
    """The small Python values of all ranks, in rank order."""
    values: list[Any] = [value] * size()
    if size() > 1:
        torch_dist.all_gather_object(values, value)
    return values


def first_problem(problem: str) -> str:
    """The problem of the first rank that has one, "" where none has; waits for all ranks."""
    return next((text for text in gather_objects(problem) if text), "")


def store() -> torch_dist.Store:
    """Keys and values that all ranks see, also from threads: its calls are no collectives."""
    return torch_dist.distributed_c10d._get_default_store() if size() > 1 else torch_dist.HashStore()


def barrier() -> None:
    """Wait until all ranks are here."""
    if size() > 1:
        torch_dist.barrier()


def raise_together(problem: UserError | Stopped | None) -> None:
    """Raise on all ranks if any has a problem: its own, or one of the gravest kind; a collective call."""
    kinds = (UserError, DataGone, Stopped)
    mine = max((number for number, kind in enumerate(kinds, 1) if isinstance(problem, kind)), default=0)
    gravest = int(all_reduce_(torch.tensor(mine), "max"))
    if problem is not None and mine == gravest:
        raise problem
    if gravest:
        raise kinds[gravest - 1](str(problem or "another rank stopped the run; its message says why"))


class Agreement:
    """Facts that any rank may raise and all ranks learn at the same step, without making a GPU wait.

    Each call starts a maximum over the ranks of small non-negative CPU integers and returns the result of the
    call before, so that the exchange overlaps with a training step.
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self._pending: tuple[Any, Tensor] | None = None

    def exchange(self, mine: list[int]) -> list[int]:
        """Send `mine`; returns the maxima over all ranks of what was sent by the call before (zeros at first)."""
        if size() == 1:
            return mine
        agreed = self.finish()
        flags = torch.tensor(mine, dtype=torch.int64)
        self._pending = (torch_dist.all_reduce(flags, op=torch_dist.ReduceOp.MAX, async_op=True), flags)
        return agreed

    def finish(self) -> list[int]:
        """Result of the exchange under way, zeros if there is none."""
        if self._pending is None:
            return [0] * self._length
        work, flags = self._pending
        self._pending = None
        work.wait()
        return flags.tolist()


def all_reduce_sum(x: Tensor, group: Any = None) -> Tensor:
    """Differentiable sum over the ranks of `group` (all ranks when None); the gradient is summed likewise."""
    return _AllReduceSum.apply(x, group) if size() > 1 else x


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = x.clone()
        torch_dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        total = grads[0].clone()
        torch_dist.all_reduce(total, group=ctx.group)
        return total, None


def subgroup(group_size: int) -> Any:
    """Process group of this rank among consecutive groups of `group_size` ranks; None stands for all ranks.

    Raises:
        UserError: the number of processes is not a multiple of `group_size`.
    """
    if group_size <= 0 or group_size >= size():
        return None
    if size() % group_size:
        text = f"--syncbn_process_group_size {group_size} does not divide the {size()} processes; choose a divisor"
        raise UserError(text)
    return torch_dist.new_subgroups(group_size=group_size)[0]
