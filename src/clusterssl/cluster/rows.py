"""The rows of all ranks as one table, of which each rank holds some: numbering, selecting and fetching rows.

Shape suffixes: N rows of this rank, D dimension, R rows asked for.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clusterssl import dist
from clusterssl.errors import UserError
from clusterssl.rng import Stream, uniform


class GlobalRows:
    """This rank's rows and their numbers among the rows of all ranks.

    What is drawn or selected depends on the numbers, never on the rank that holds a row.
    """

    def __init__(self, x_ND: Tensor, ids_N: Tensor | None = None) -> None:
        """Number the rows.

        Args:
            x_ND: rows of this rank.
            ids_N: their numbers, each once over all ranks; None numbers them in rank order.
        """
        self.x_ND = x_ND
        counts = dist.all_gather_cat(torch.tensor([len(x_ND)]))
        self.total = int(counts.sum())
        before = int(counts[: dist.rank()].sum())
        self.ids_N: NDArray[np.int64] = (
            np.arange(before, before + len(x_ND)) if ids_N is None else ids_N.cpu().numpy().astype(np.int64)
        )
        self._by_id = np.argsort(self.ids_N)

    def check(self, *, unit: bool) -> None:
        """Refuse rows that are not finite, or not of unit length; on all ranks together.

        Raises:
            UserError: how many rows are bad.
        """
        norm_N = torch.linalg.vector_norm(self.x_ND, dim=1)
        finite_N = torch.isfinite(norm_N)
        off_N = finite_N & ((norm_N - 1).abs() > 1e-3)
        broken, off = dist.all_reduce_(torch.stack([(~finite_N).sum(), off_N.sum()])).tolist()
        if broken:
            raise UserError(f"k-means: {broken} of {self.total} features are not finite; training has diverged")
        if unit and off:
            raise UserError(
                f"k-means: {off} of {self.total} features are not of unit length, which spherical k-means needs; "
                "scale them"
            )

    def draw_keys(self, seed: int, draw: int) -> NDArray[np.float64]:
        """A random number for each row of this rank, [N] in [0, 1)."""
        return uniform(seed, Stream.KMEANS, draw, self.ids_N, 1)[:, 0]

    def smallest(self, keys_N: NDArray[np.float64], count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The rows of all ranks with the smallest keys; of equal keys the smaller number comes first.

        Args:
            keys_N: of this rank's rows, float64.
            count: R.

        Returns:
            Numbers of the rows [R], smallest key first, and the places [R] that they have on this rank, -1 for rows of
            other ranks.
        """
        mine = np.arange(len(keys_N))
        if count < len(keys_N):
            mine = np.flatnonzero(keys_N <= np.partition(keys_N, count - 1)[count - 1])
        mine = mine[np.lexsort((self.ids_N[mine], keys_N[mine]))[:count]]
        keys = dist.all_gather_cat(torch.from_numpy(keys_N[mine])).numpy()
        ids = dist.all_gather_cat(torch.from_numpy(self.ids_N[mine])).numpy()
        chosen_R = ids[np.lexsort((ids, keys))[:count]]
        return chosen_R, self.places(chosen_R)

    def places(self, ids_R: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where rows of these numbers are on this rank, int64 [R]; -1 for rows of other ranks."""
        if not len(self.ids_N):
            return np.full(len(ids_R), -1)
        found_R = self._by_id[np.searchsorted(self.ids_N, ids_R, sorter=self._by_id).clip(max=len(self.ids_N) - 1)]
        return np.where(self.ids_N[found_R] == ids_R, found_R, -1)

    def fetch(self, values_N: Tensor, places_R: NDArray[np.int64]) -> Tensor:
        """Values of selected rows on every rank; a collective call.

        Args:
            values_N: [N, ...] of this rank's rows, such as the rows themselves.
            places_R: as `places` gives them.

        Returns:
            [R, ...], each from the rank that holds the row.
        """
        values_R = values_N.new_zeros((len(places_R), *values_N.shape[1:]))
        here = torch.from_numpy(np.flatnonzero(places_R >= 0)).to(values_N.device)
        values_R[here] = values_N[torch.from_numpy(places_R[places_R >= 0]).to(values_N.device)]
        return dist.all_reduce_(values_R)
