"""k-means of frozen features for evaluation: several starts shared out over the ranks, the best one counts.

Legend of suffixes: N images, F features, K clusters.
"""

from __future__ import annotations

import io
import logging
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clusterssl import dist
from clusterssl.cluster.kmeans import KMeansOptions, euclidean_kmeans
from clusterssl.errors import UserError
from clusterssl.files import atomic_write, first_line

logger = logging.getLogger(__name__)

_ITERATIONS = 100
_ROWS = 4096


def fit(
    rows_NF: Tensor, k: int, *, seed: int, starts: int = 10, backend: str = "sklearn",
    device: torch.device | str = "cpu",
) -> Tensor:  # fmt: skip
    """Centres of the start with the least inertia, float32 [K, F]. A collective: every rank passes the same rows.

    Args:
        rows_NF: float32, as they are (the published evaluation does not normalise).
        k: number of clusters.
        seed: of the starts.
        starts: independent runs from k-means++ centres.
        backend: "sklearn" (published: Lloyd to convergence, at most 300 iterations; each rank does whole runs) or
            "torch" (100 iterations, all ranks share each run, on the GPU where there is one).
        device: where "torch" computes.

    Raises:
        UserError: fewer images than clusters.
    """
    if len(rows_NF) < k:
        raise UserError(f"--kk {k}: only {len(rows_NF)} images to cluster; ask for fewer clusters or show more images")
    if backend == "torch":
        return _by_torch(rows_NF, k, seed, starts, device)
    from sklearn.cluster import KMeans

    best_inertia, best_start, centres = float("inf"), starts, torch.zeros(k, rows_NF.shape[1])
    for start in range(dist.rank(), starts, dist.size()):
        fitted = KMeans(k, n_init=1, random_state=(seed + start) % 2**32).fit(rows_NF.numpy())
        logger.info(
            "k-means: start %d of %d, inertia %.6g, %d iterations", start + 1, starts, fitted.inertia_, fitted.n_iter_
        )
        if fitted.inertia_ < best_inertia:
            best_inertia, best_start = float(fitted.inertia_), start
            centres = torch.from_numpy(fitted.cluster_centers_).float()
    found = dist.all_gather_cat(torch.tensor([[best_inertia, best_start]], dtype=torch.float64)).tolist()
    winner = min(range(len(found)), key=lambda rank: found[rank])
    return dist.broadcast_(centres.contiguous(), winner)


def _by_torch(rows_NF: Tensor, k: int, seed: int, starts: int, device: torch.device | str) -> Tensor:
    first, last = dist.share(len(rows_NF))
    mine = rows_NF[first:last].to(device)
    options = KMeansOptions(kmeans_iters=_ITERATIONS, kmeans_init="kmeans++")
    found = [euclidean_kmeans(mine, k, options, seed=seed, draw=start) for start in range(starts)]
    return min(found, key=lambda clusters: clusters.inertia[-1]).centroids_KD.float().cpu()


def nearest_centre(rows_NF: Tensor, centres_KF: Tensor) -> NDArray[np.int64]:
    """The centre of least Euclidean distance to each row, int64 [N]."""
    half_K = centres_KF.double().square().sum(1) / 2
    return np.concatenate([
        (part.double() @ centres_KF.double().T - half_K).argmax(1).numpy() for part in rows_NF.split(_ROWS)
    ])  # fmt: skip


def save_centres(centres_KF: Tensor, path: Path) -> None:
    """Keep centres as an .npy file (rank 0).

    Raises:
        UserError: it cannot be written.
    """
    if dist.rank() == 0:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{path.parent}: could not be made ({first_line(error)})") from error
        packed = io.BytesIO()
        np.save(packed, centres_KF.numpy())
        atomic_write(path, lambda file: file.write(packed.getvalue()))


def load_centres(path: str, feature_dim: int) -> Tensor:
    """Centres kept by `save_centres`, float32 [K, F].

    Raises:
        UserError: unreadable, or centres of features of another size.
    """
    try:
        centres_KF = torch.from_numpy(np.load(path, allow_pickle=False)).float()
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise UserError(f"--kmeans_cls {path}: not a readable .npy file of centres ({first_line(error)})") from error
    if centres_KF.ndim != 2 or centres_KF.shape[1] != feature_dim:
        shape = "x".join(map(str, centres_KF.shape))
        raise UserError(f"--kmeans_cls {path}: holds {shape} numbers, not centres of {feature_dim} features")
    return centres_KF
