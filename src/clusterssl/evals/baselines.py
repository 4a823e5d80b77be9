"""What pretraining has to beat: raw pixels, and the same network untrained, by four measures.

Legend of suffixes: N training images, Q test images, F features.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn.functional import normalize as unit_rows

from clusterssl.data import MEAN, STD
from clusterssl.evals.clustering import cluster_scores
from clusterssl.evals.knn import knn_accuracy


class Pixels(nn.Module):
    """A backbone that does nothing: the pixels of normalised images, scaled back to 0..1, as features."""

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Features B x 3HW."""
        std, mean = (images_B3HW.new_tensor(values).view(3, 1, 1) for values in (STD, MEAN))
        return (images_B3HW * std + mean).flatten(1)


@torch.no_grad()
def calibrate_batchnorm(network: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set the running statistics of all BatchNorm layers to the averages over some images; weights stay.

    An untrained network whose statistics fit the data is a stronger baseline than one with the initial ones.

    Args:
        network: changed in place; left in evaluation mode.
        batches: normalised images B x 3 x h x w.
    """
    norms = [layer for layer in network.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    momenta = [layer.momentum for layer in norms]
    for layer in norms:
        layer.reset_running_stats()
        layer.momentum = None
    network.train()
    for images in batches:
        network(images)
    for layer, momentum in zip(norms, momenta, strict=True):
        layer.momentum = momentum
    network.eval()


def few_labels_accuracy(
    train_NF: Tensor, train_labels_N: Tensor, test_QF: Tensor, test_labels_Q: Tensor, *, per_class: int, seed: int
) -> float:
    """Accuracy of a logistic regression that sees `per_class` labels of each class.

    Every feature is brought to mean 0 and deviation 1 over all training images, which needs no label: representations
    of different scale then profit alike from the one strength of regularisation.

    Args:
        train_NF: features of all training images.
        train_labels_N: their classes; only those of the drawn images are used.
        test_QF: features of the test images.
        test_labels_Q: their classes.
        per_class: labels of each class.
        seed: of the draw.

    Returns:
        Percent of the test images.
    """
    scaler = StandardScaler().fit(train_NF.numpy())
    rows = draw_per_class(train_labels_N.numpy(), per_class, seed)
    model = LogisticRegression(max_iter=1000)
    model.fit(scaler.transform(train_NF.numpy()[rows]), train_labels_N.numpy()[rows])
    return 100.0 * float(model.score(scaler.transform(test_QF.numpy()), test_labels_Q.numpy()))


def draw_per_class(labels_N: NDArray[np.int64], per_class: int, seed: int) -> NDArray[np.int64]:
    """Positions of `per_class` random images of each class, class after class."""
    generator = np.random.default_rng(seed)
    drawn = [generator.permutation(np.flatnonzero(labels_N == label))[:per_class] for label in np.unique(labels_N)]
    return np.concatenate(drawn)


def label_scores(
    train_NF: Tensor, train_labels_N: Tensor, test_QF: Tensor, test_labels_Q: Tensor, *, seed: int,
    neighbours: int = 10, per_class: int = 10, draws: int = 3,
) -> dict[str, float]:  # fmt: skip
    """In percent, "knn": k-NN with all training labels; "few": `few_labels_accuracy`, mean over `draws` draws."""
    few = [
        few_labels_accuracy(
            train_NF, train_labels_N, test_QF, test_labels_Q, per_class=per_class, seed=seed * draws + draw
        )
        for draw in range(draws)
    ]
    top1, _ = knn_accuracy(train_NF, train_labels_N, test_QF, test_labels_Q, ks=(neighbours,))[neighbours]
    return {"knn": top1, "few": sum(few) / draws}


def unlabelled_scores(features_NF: Tensor, labels_N: Tensor, *, seed: int) -> dict[str, float]:
    """In percent, "nmi" and "hungarian": how k-means clusters of unit features, as many as classes, agree with them."""
    scores = cluster_scores(unit_rows(features_NF, dim=1), labels_N, k=len(labels_N.unique()), seed=seed)
    return {"nmi": scores["nmi"], "hungarian": scores["hungarian_accuracy"]}
