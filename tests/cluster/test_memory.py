from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from clusterssl.cluster.memory import IGNORED, MemoryBank, label_table
from clusterssl.errors import UserError
from tests.ranks import run_ranks

STEPS, GLOBAL, DIM = 3, 8, 4
CPU = torch.device("cpu")


def epoch_of(number: int) -> tuple[Tensor, Tensor]:
    """Embeddings [steps, 2, images, D] and positions [steps, images] of all ranks."""
    generator = torch.Generator().manual_seed(number)
    z = torch.randn(STEPS, 2, GLOBAL, DIM, generator=generator)
    return z, torch.randperm(50, generator=generator)[: STEPS * GLOBAL].view(STEPS, GLOBAL)


def bank(rank: int, world_size: int, epochs: int, more_steps: int = 0) -> MemoryBank:
    """The bank of one rank after whole epochs and some steps."""
    share = GLOBAL // world_size
    memory = MemoryBank(2, STEPS, share, DIM, CPU)
    mine = slice(rank * share, (rank + 1) * share)
    steps = [(z[:, mine], i[mine]) for e in range(epochs + 1) for z, i in zip(*epoch_of(e), strict=True)]
    for z, index in itertools.islice(steps, epochs * STEPS + more_steps):
        memory.write(z, index)
    return memory


def test_slots_follow_the_order_of_the_steps_and_are_overwritten() -> None:
    z, index = epoch_of(0)
    memory = bank(0, 1, 1)
    assert torch.equal(memory.index_M, index.flatten())
    assert torch.equal(memory.embeddings_AMD, z.permute(1, 0, 2, 3).flatten(1, 2))
    later_z, later_index = epoch_of(1)
    memory.write(later_z[0], later_index[0])
    assert torch.equal(memory.index_M, torch.cat([later_index[0], index[1:].flatten()]))
    assert torch.equal(memory.embeddings_AMD[1, :GLOBAL], later_z[0, 1])
    assert torch.equal(memory.embeddings_AMD[1, GLOBAL:], z[1:, 1].flatten(0, 1))


def test_micro_batches_fill_the_slots_of_their_step() -> None:
    whole, parts = bank(0, 1, 1), MemoryBank(2, STEPS, GLOBAL, DIM, CPU)
    for z, index in zip(*epoch_of(0), strict=True):
        for part in (slice(0, 5), slice(5, 8)):
            parts.write(z[:, part].double(), index[part])
    assert torch.equal(parts.embeddings_AMD, whole.embeddings_AMD) and torch.equal(parts.index_M, whole.index_M)


def test_fill_runs_all_batches_without_gradient() -> None:
    z, index = epoch_of(0)
    memory = MemoryBank(2, STEPS, GLOBAL, DIM, CPU)
    assert not memory.filled
    weight = torch.ones(1, requires_grad=True)
    memory.fill(lambda crops: torch.stack([crop * weight for crop in crops]), zip(map(list, z), index, strict=True))
    assert memory.filled and not memory.embeddings_AMD.requires_grad
    assert torch.equal(memory.embeddings_AMD, bank(0, 1, 1).embeddings_AMD)


def states(rank: int, world_size: int) -> tuple[dict, Tensor, Tensor]:
    memory = bank(rank, world_size, 1, 2)
    return memory.state_dict(), memory.slots(), memory.index_M


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_moves_to_another_number_of_ranks(before: int, after: int) -> None:
    """Shards of the old ranks, joined and shared out anew, give what the new ranks would have written."""
    old = [state for state, _, _ in (run_ranks(states, before) if before > 1 else [states(0, 1)])]
    joined = {name: torch.cat([state["sharded"][name] for state in old]) for name in old[0]["sharded"]}
    for rank in range(after):
        share = {name: rows.chunk(after)[rank] for name, rows in joined.items()}
        memory, expected = MemoryBank(2, STEPS, GLOBAL // after, DIM, CPU), bank(rank, after, 1, 2)
        memory.load_state_dict({**old[0], "sharded": share})
        z, index = epoch_of(7)
        for one in (memory, expected):
            one.write(z[0, :, : GLOBAL // after], index[0, : GLOBAL // after])
        assert torch.equal(memory.embeddings_AMD, expected.embeddings_AMD)
        assert torch.equal(memory.index_M, expected.index_M)


def test_slots_have_the_same_numbers_on_any_number_of_ranks() -> None:
    _, slots, index = states(0, 1)
    alone = dict(zip(slots.tolist(), index.tolist(), strict=True))
    assert sorted(alone) == list(range(STEPS * GLOBAL))
    together: dict[int, int] = {}
    for _, slots, index in run_ranks(states, 2):
        together |= dict(zip(slots.tolist(), index.tolist(), strict=True))
    assert together == alone


def test_refuses_the_bank_of_another_dataset() -> None:
    state = bank(0, 1, 1).state_dict()
    with pytest.raises(UserError, match=r"memory bank has \(2, 3, 8, 4\) .* these flags make \(2, 4, 8, 4\)"):
        MemoryBank(2, STEPS + 1, GLOBAL, DIM, CPU).load_state_dict(state)


def loop_table(labels: Tensor, index: Tensor, slots: Tensor, num_images: int) -> Tensor:
    """Labels written one by one in the order of the slots."""
    table = torch.full((len(labels), num_images), IGNORED, dtype=torch.int32)
    for slot in slots.argsort():
        table[:, index[slot]] = labels[:, slot].int()
    return table


def slots_with_repeats() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(5, (2, 40), generator=generator)
    index = torch.randint(30, (40,), generator=generator)
    return labels, index, torch.randperm(40, generator=generator)


def table_of_rank(rank: int, world_size: int) -> Tensor:
    labels, index, slots = slots_with_repeats()
    mine = slice(rank, None, world_size)
    return label_table(labels[:, mine], index[mine], slots[mine], 35)


def test_table_keeps_the_label_of_the_later_slot_and_ignores_unseen_images() -> None:
    expected = loop_table(*slots_with_repeats(), 35)
    assert (expected == IGNORED).any()
    for table in [table_of_rank(0, 1), *run_ranks(table_of_rank, 2)]:
        assert table.dtype == torch.int32 and torch.equal(table, expected)
