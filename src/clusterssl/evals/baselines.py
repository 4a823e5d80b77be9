"""What pretraining has to beat: raw pixels, and the same network untrained, by four measures.

Legend of suffixes: B, N training images, Q test images, F features, H x W pixels.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import normalize as unit_rows

from clusterssl.data import MEAN, STD
from clusterssl.evals.clustering import cluster_scores
from clusterssl.evals.knn import knn_accuracy
from clusterssl.evals.linear import few_label_accuracy


class Pixels(nn.Module):
    """A backbone that does nothing: the pixels of normalised images, scaled back to 0..1, as features."""

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Features B x 3HW."""
        std, mean = (images_B3HW.new_tensor(values).view(3, 1, 1) for values in (STD, MEAN))
        return (images_B3HW * std + mean).flatten(1)


def label_scores(
    train_NF: Tensor, train_labels_N: Tensor, test_QF: Tensor, test_labels_Q: Tensor, *, seed: int,
    neighbours: int = 10, per_class: int = 10, draws: int = 3,
) -> dict[str, float]:  # fmt: skip
    """In percent, "knn": k-NN with all training labels; "few": `few_label_accuracy`, mean over `draws` draws."""
    few = few_label_accuracy(
        train_NF, train_labels_N, test_QF, test_labels_Q, labels_per_class=per_class, draws=draws, seed=seed
    )
    top1, _ = knn_accuracy(train_NF, train_labels_N, test_QF, test_labels_Q, ks=(neighbours,))[neighbours]
    return {"knn": top1, "few": few.mean}


def unlabelled_scores(features_NF: Tensor, labels_N: Tensor, *, seed: int) -> dict[str, float]:
    """In percent, "nmi" and "hungarian": how k-means clusters of unit features, as many as classes, agree with them."""
    scores = cluster_scores(unit_rows(features_NF, dim=1), labels_N, k=len(labels_N.unique()), seed=seed)
    return {"nmi": scores["nmi"], "hungarian": scores["hungarian_accuracy"]}
