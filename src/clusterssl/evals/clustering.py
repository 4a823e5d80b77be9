"""How well clusters agree with classes: k-means of embeddings, NMI, AMI, ARI and accuracy after matching.

Legend of suffixes: N images, D embedding size, P clusters, C classes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
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


def agreement(clusters_N: ArrayLike, labels_N: ArrayLike) -> dict[str, float]:
    """Agreement of a clustering with classes, in percent.

    Returns:
        "nmi" (arithmetic mean), "ami", "ari", "hungarian_accuracy": images whose cluster is matched to their class by
        the best one-to-one matching (Kuhn 1955). With more clusters than classes also "majority_accuracy": as before,
        and every cluster left without a class takes its most frequent one (the protocol of Self-Classifier, Amrani
        et al. 2022).
    """
    clusters_N, labels_N = np.asarray(clusters_N), np.asarray(labels_N)
    counts_PC = metrics.cluster.contingency_matrix(labels_N, clusters_N).T
    rows, columns = linear_sum_assignment(counts_PC, maximize=True)
    matched = int(counts_PC[rows, columns].sum())
    scores = {
        "nmi": metrics.normalized_mutual_info_score(labels_N, clusters_N),
        "ami": metrics.adjusted_mutual_info_score(labels_N, clusters_N),
        "ari": metrics.adjusted_rand_score(labels_N, clusters_N),
        "hungarian_accuracy": matched / len(labels_N),
    }
    if counts_PC.shape[0] > counts_PC.shape[1]:
        left_over = np.setdiff1d(np.arange(len(counts_PC)), rows)
        scores["majority_accuracy"] = (matched + int(counts_PC[left_over].max(1).sum())) / len(labels_N)
    return {name: 100.0 * float(value) for name, value in scores.items()}
