"""How well clusters agree with classes: NMI, AMI, ARI, and accuracy by three ways of naming clusters.

Legend of suffixes: N images, D embedding size, P clusters that occur, C classes that occur.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linear_sum_assignment
from sklearn import metrics
from sklearn.cluster import KMeans


def cluster_scores(
    embeddings_ND: ArrayLike, labels_N: ArrayLike, k: int, *, seed: int = 0, n_init: int = 10
) -> dict[str, float]:
    """Cluster embeddings by k-means without labels, then compare with the labels.

    Args:
        embeddings_ND: rows as they are to be clustered (normalise them before if cosine is meant); tensor or array.
        labels_N: classes.
        k: number of clusters.
        seed: seed of k-means.
        n_init: restarts of k-means, the one of least inertia counts.

    Returns:
        See `agreement`.
    """
    points_ND = np.asarray(embeddings_ND, dtype=np.float64)
    clusters_N = KMeans(n_clusters=k, n_init=n_init, random_state=seed).fit_predict(points_ND)
    return agreement(clusters_N, labels_N)


class Matching(NamedTuple):
    """The class that each cluster stands for."""

    cluster_P: NDArray[np.int64]
    """ids of the clusters that occur, ascending"""
    class_P: NDArray[np.int64]
    """class of each: by the best one-to-one matching, or, left over by it, the most frequent one"""
    matched_P: NDArray[np.bool_]
    """whether the matching gave it"""
    counts_PC: NDArray[np.int64]
    """images of every cluster and class"""
    class_C: NDArray[np.int64]
    """the classes that occur, ascending"""

    def classes_of(self, clusters_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """The class that every image's cluster stands for, [N]."""
        return self.class_P[np.searchsorted(self.cluster_P, clusters_N)]


def match(clusters_N: ArrayLike, labels_N: ArrayLike) -> Matching:
    """Name clusters by classes: the one-to-one matching that gets most images right (Kuhn 1955).

    With more clusters than classes, those that the matching leaves over take their most frequent class (Amrani et al.
    2022, section 4.1).
    """
    clusters_N, labels_N = _ids(clusters_N), _ids(labels_N)
    cluster_P, class_C = np.unique(clusters_N), np.unique(labels_N)
    counts_PC = metrics.cluster.contingency_matrix(labels_N, clusters_N).T
    rows, columns = linear_sum_assignment(counts_PC, maximize=True)
    matched_P = np.zeros(len(cluster_P), dtype=bool)
    matched_P[rows] = True
    column_P = counts_PC.argmax(1)
    column_P[rows] = columns
    return Matching(cluster_P, class_C[column_P], matched_P, counts_PC, class_C)


def agreement(clusters_N: ArrayLike, labels_N: ArrayLike) -> dict[str, float]:
    """Agreement of a clustering with classes, in percent.

    Returns:
        "nmi" (arithmetic mean), "ami", "ari"; "hungarian_accuracy": images whose cluster is matched to their class by
        the best one-to-one matching; "label_accuracy": images of their cluster's most frequent class (Asano et al.
        2020). With more clusters than classes also "majority_accuracy": as the second, and every cluster left over
        takes its most frequent class (Amrani et al. 2022).
    """
    clusters_N, labels_N = _ids(clusters_N), _ids(labels_N)
    found = match(clusters_N, labels_N)
    right_N, one_to_one_N = _right(found, clusters_N, labels_N)
    scores = {
        **_information(clusters_N, labels_N),
        "hungarian_accuracy": (right_N & one_to_one_N).mean(),
        "label_accuracy": found.counts_PC.max(1).sum() / len(labels_N),
    }
    if len(found.cluster_P) > len(found.class_C):
        scores["majority_accuracy"] = right_N.mean()
    return {name: 100.0 * float(value) for name, value in scores.items()}


def superclass_agreement(clusters_N: ArrayLike, labels_N: ArrayLike, superclass_C: ArrayLike) -> dict[str, float]:
    """Agreement with superclasses, in percent, over the images of classes that have one (Amrani et al. 2022, table 3).

    Clusters are named by classes; then class and superclass take the places of both. As published, "nmi", "ami" and
    "ari" compare clusters with classes; "superclass_nmi", ... compare them with superclasses.

    Args:
        clusters_N: of the images.
        labels_N: classes of the images.
        superclass_C: superclass of every class; -1 for none.

    Returns:
        Those and "accuracy": images whose cluster stands for a class of their superclass.
    """
    above_C, inside_N = _ids(superclass_C), _ids(superclass_C)[_ids(labels_N)] >= 0
    seen_N, classes_N = _ids(clusters_N)[inside_N], _ids(labels_N)[inside_N]
    above_N = above_C[classes_N]
    named_N = above_C[match(seen_N, classes_N).classes_of(seen_N)]
    with_superclasses = {f"superclass_{name}": value for name, value in _information(seen_N, above_N).items()}
    scores = {"accuracy": (named_N == above_N).mean(), **_information(seen_N, classes_N), **with_superclasses}
    return {name: 100.0 * float(value) for name, value in scores.items()}


class ClusterTable(NamedTuple):
    """What every cluster is like; entries belong together."""

    cluster_P: NDArray[np.int64]
    class_P: NDArray[np.int64]
    """class (or superclass) that it stands for"""
    images_P: NDArray[np.int64]
    accuracy_P: NDArray[np.float64]
    """share of its images that are of that class"""
    entropy_P: NDArray[np.float64]
    """nats, of the classes of its images"""

    def ordered(self, order: NDArray[np.int64]) -> ClusterTable:
        """Some entries, in this order."""
        return self._replace(**{name: column[order] for name, column in self._asdict().items()})


def table_of_clusters(
    clusters_N: ArrayLike, labels_N: ArrayLike, superclass_C: ArrayLike | None = None, *, least: int = 1
) -> ClusterTable:
    """Clusters of at least `least` images, the most accurate first, equal ones by number.

    With `superclass_C` clusters are named as before, then superclasses take the place of classes, over their images.
    """
    clusters_N, labels_N = _ids(clusters_N), _ids(labels_N)
    above_C = np.arange(labels_N.max() + 1) if superclass_C is None else _ids(superclass_C)
    inside_N = above_C[labels_N] >= 0
    clusters_N, labels_N = clusters_N[inside_N], labels_N[inside_N]
    found = match(clusters_N, labels_N)
    images_P = found.counts_PC.sum(1)
    right_PC = above_C[found.class_C][None] == above_C[found.class_P][:, None]
    share_PC = found.counts_PC / images_P[:, None]
    entropy_P = (share_PC * np.log(1 / np.where(share_PC > 0, share_PC, 1.0))).sum(1)
    accuracy_P = (found.counts_PC * right_PC).sum(1) / images_P
    table = ClusterTable(found.cluster_P, above_C[found.class_P], images_P, accuracy_P, entropy_P)
    order = np.argsort(-accuracy_P, kind="stable")
    return table.ordered(order[images_P[order] >= least])


def confusions(clusters_N: ArrayLike, labels_N: ArrayLike, most: int) -> list[tuple[int, int, int]]:
    """The most frequent mistakes after naming: (true class, class that the cluster stands for, images)."""
    clusters_N, labels_N = _ids(clusters_N), _ids(labels_N)
    named_N = match(clusters_N, labels_N).classes_of(clusters_N)
    wrong_N = named_N != labels_N
    pairs, counts = np.unique(np.stack([labels_N, named_N], 1)[wrong_N], axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:most]
    return [(int(pairs[i, 0]), int(pairs[i, 1]), int(counts[i])) for i in order]


def _ids(values: ArrayLike) -> NDArray[np.int64]:
    return np.asarray(values, dtype=np.int64)


def _right(
    found: Matching, clusters_N: NDArray[np.int64], labels_N: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Images of the class their cluster stands for; images whose cluster was matched one to one."""
    row_N = np.searchsorted(found.cluster_P, clusters_N)
    return found.class_P[row_N] == labels_N, found.matched_P[row_N]


def _information(clusters_N: NDArray[np.int64], labels_N: NDArray[np.int64]) -> dict[str, float]:
    return {
        "nmi": metrics.normalized_mutual_info_score(labels_N, clusters_N),
        "ami": metrics.adjusted_mutual_info_score(labels_N, clusters_N),
        "ari": metrics.adjusted_rand_score(labels_N, clusters_N),
    }
