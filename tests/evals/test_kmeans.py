"""k-means for evaluation beside scikit-learn's; which start counts; centres on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from clusterssl.errors import UserError
from clusterssl.evals.kmeans import fit, load_centres, nearest_centre, save_centres
from tests.ranks import run_ranks


def points(count: int = 400, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(9, 5, generator=generator)
    return centres[torch.randint(9, (count,), generator=generator)] + torch.randn(count, 5, generator=generator)


def inertia(rows: torch.Tensor, centres: torch.Tensor) -> float:
    return float(torch.cdist(rows.double(), centres.double()).square().min(1).values.sum())


def test_the_best_start_counts() -> None:
    rows = points()
    starts = [KMeans(9, n_init=1, random_state=3 + start).fit(rows.numpy()) for start in range(4)]
    best = min(starts, key=lambda fitted: fitted.inertia_)
    assert len({round(fitted.inertia_, 2) for fitted in starts}) > 1
    found = fit(rows, 9, seed=3, starts=4)
    assert found.numpy() == pytest.approx(best.cluster_centers_, abs=1e-5)
    assert np.array_equal(nearest_centre(rows, found), best.labels_)
    more = points(seed=1)
    assert np.array_equal(nearest_centre(more, found), best.predict(more.numpy()))


def test_torch_is_as_good() -> None:
    rows = points()
    theirs = KMeans(9, n_init=10, random_state=0).fit(rows.numpy()).inertia_
    assert inertia(rows, fit(rows, 9, seed=0, backend="torch")) < 1.02 * theirs


def test_nearest_centre_far_from_the_origin() -> None:
    rows = 1000 + points()
    centres = rows[:20]
    expected = torch.cdist(rows.double(), centres.double()).argmin(1).numpy()
    assert np.array_equal(nearest_centre(rows, centres), expected)


def test_more_clusters_than_images() -> None:
    with pytest.raises(UserError, match="--kk 50: only 40 images"):
        fit(points(40), 50, seed=0)


def test_centres_on_disk(tmp_path: Path) -> None:
    centres = points(6)
    save_centres(centres, tmp_path / "new" / "kmeans.npy")
    assert torch.equal(load_centres(str(tmp_path / "new" / "kmeans.npy"), 5), centres)
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    for name, dim, message in (
        ("new/kmeans.npy", 4, "holds 6x5 numbers, not centres of 4"), ("no.npy", 5, "not a readable"),
        ("objects.npy", 5, "not a readable"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            load_centres(str(tmp_path / name), dim)


def on_a_rank(rank: int, world_size: int) -> list[Any]:
    return [fit(points(), 9, seed=3, starts=starts).numpy() for starts in (1, 4)]


def test_two_ranks_share_the_starts() -> None:
    for found in run_ranks(on_a_rank, 2):
        for mine, alone in zip(found, on_a_rank(0, 1), strict=True):
            assert np.array_equal(mine, alone)
