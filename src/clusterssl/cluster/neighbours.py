"""Exact nearest neighbours among the rows of all ranks.

Shape suffixes: N rows of this rank, M rows of one block, D dimensions, Q queries of a chunk, E neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clusterssl import dist, pulse
from clusterssl.errors import UserError

_CHUNK_BYTES = 1 << 26
_BLOCK_ROWS = 1 << 15


@torch.no_grad()
def nearest_neighbours(x_ND: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The nearest other rows of each row of this rank, by brute force over blocks that travel from rank to rank.

    A row is never its own neighbour, though a copy of it is. Memory: the rows of one other rank and one
    chunk of scores, never all rows or all pairs.

    Args:
        x_ND: float32 or float64 [N, D], this rank's rows; the rows of all ranks in rank order are numbered from 0.
        count: E, neighbours per row.

    Returns:
        Row numbers int64 [N, E] in order of distance, and squared Euclidean distances [N, E] of the type of the rows.

    Raises:
        UserError: there are not more than `count` rows.
    """
    sizes = dist.all_gather_cat(torch.tensor([x_ND.shape[0]], device=x_ND.device)).tolist()
    if count >= sum(sizes):
        raise UserError(f"--pic_neighbours {count}: needs more than {count} images, there are {sum(sizes)}")
    first_row = sum(sizes[: dist.rank()])
    found = x_ND.new_empty(x_ND.shape[0], 0, dtype=torch.int64), x_ND.new_empty(x_ND.shape[0], 0)
    start = 0
    for source, rows in enumerate(sizes):
        block_MD = x_ND.contiguous() if source == dist.rank() else x_ND.new_empty(rows, x_ND.shape[1])
        dist.broadcast_(block_MD, source)
        for part_MD in block_MD.split(_BLOCK_ROWS):
            pulse.tick()
            found = _merge(found, _search(x_ND, first_row, part_MD, start, count), count)
            start += part_MD.shape[0]
    return found


def _search(x_ND: Tensor, first_row: int, block_MD: Tensor, first_column: int, count: int) -> tuple[Tensor, Tensor]:
    """Nearest rows of a block, whose rows are numbered from `first_column`."""
    size = block_MD.shape[0]
    if size == 0:
        return x_ND.new_empty(x_ND.shape[0], 0, dtype=torch.int64), x_ND.new_empty(x_ND.shape[0], 0)
    half_square_M = block_MD.square().sum(1) / 2
    found = []
    for chunk_QD in x_ND.split(max(1, _CHUNK_BYTES // (x_ND.element_size() * max(size, count * x_ND.shape[1])))):
        closeness_QM = torch.addmm(half_square_M, chunk_QD, block_MD.T, beta=-1)  # falls with the distance
        own_Q = torch.arange(first_row, first_row + chunk_QD.shape[0], device=x_ND.device) - first_column
        inside_Q = (own_Q >= 0) & (own_Q < size)
        closeness_QM[inside_Q.nonzero()[:, 0], own_Q[inside_Q]] = -torch.inf
        best_QE = closeness_QM.topk(min(count, size)).indices
        # Differences, unlike the products above, keep the digits of small distances.
        square_QE = (chunk_QD[:, None] - block_MD[best_QE]).square().sum(2)
        own_QE = best_QE == own_Q[:, None]
        found.append((best_QE + first_column, square_QE.masked_fill_(own_QE, torch.inf)))
        first_row += chunk_QD.shape[0]
    return torch.cat([index for index, _ in found]), torch.cat([square for _, square in found])


def _merge(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], count: int) -> tuple[Tensor, Tensor]:
    """The nearest of two lists; the earlier one wins ties."""
    square_NE, order_NE = torch.cat([one[1], other[1]], dim=1).sort(dim=1, stable=True)
    index_NE = torch.cat([one[0], other[0]], dim=1).gather(1, order_NE)
    return index_NE[:, :count], square_NE[:, :count]
