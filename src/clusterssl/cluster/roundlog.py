"""A record of every round of clustering: which image went where, and how much that changed.

Shape suffix: N images of the dataset.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from clusterssl.cluster.rounds import Round
from clusterssl.errors import UserError
from clusterssl.files import atomic_write, first_line

logger = logging.getLogger(__name__)

Ints = NDArray[np.integer]


def agreement(one_N: Ints, other_N: Ints) -> float:
    """Normalised mutual information of two labelings (arithmetic mean), of the images that both label from 0 on."""
    from sklearn.metrics import normalized_mutual_info_score

    known_N = (one_N >= 0) & (other_N >= 0)
    return float(normalized_mutual_info_score(one_N[known_N], other_N[known_N])) if known_N.any() else float("nan")


def record_round(folder: Path, epoch: int, found: Round, before_N: Tensor, classes_N: Tensor) -> Path:
    """Write clusters/epoch<number>.npz and one line to the log.

    Args:
        folder: run directory.
        epoch: that trains on these labels.
        found: clusters of all images.
        before_N: those of the round before, -1 where there are none.
        classes_N: true classes, -1 where unknown; they are compared and nothing else.

    Returns:
        The file: arrays labels (int32), nmi_before, nmi_classes (NaN where there is nothing to compare) and loss.

    A file that cannot be written is warned of: no run ends for a record, and only one rank is here.
    """
    labels_N, loss = found.labels_N.cpu().numpy(), found.loss
    nmi_before, nmi_classes = (agreement(labels_N, other_N.cpu().numpy()) for other_N in (before_N, classes_N))
    path = folder / "clusters" / f"epoch{epoch:04}.npz"
    arrays = {"labels": labels_N, "nmi_before": nmi_before, "nmi_classes": nmi_classes, "loss": loss}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, lambda file: np.savez_compressed(file, **arrays))  # type: ignore[arg-type]
    except (OSError, UserError) as error:
        logger.warning("%s: %s", path, first_line(error))
    sizes = np.bincount(labels_N)
    compared = {"the round before": nmi_before, "the classes": nmi_classes}
    shown = "".join(f", NMI with {name} {nmi:.3f}" for name, nmi in compared.items() if nmi == nmi)
    used = sizes[sizes > 0]
    logger.info(
        "epoch %d: %d clusters of %d to %d images, loss %.4g%s", epoch, len(used), used.min(), used.max(), loss, shown
    )
    return path
