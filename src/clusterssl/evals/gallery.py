"""What clusters look like: their most typical images as strips."""

from __future__ import annotations

import numpy as np
from sklearn.cluster import KMeans
from torch.nn.functional import normalize

from clusterssl.data import Source
from clusterssl.evals.features import extract
from clusterssl.evals.setup import Embedding
from clusterssl.models.weights import model_from_weights
from clusterssl.report.pictures import strip

SHOWN = 12


def cluster_strips(
    checkpoint: str, source: Source, image_size: tuple[int, int], *, clusters: int, seed: int
) -> tuple[tuple[str, str, str], ...]:
    """Per k-means cluster of a network's embeddings, largest first: caption, description, picture.

    Labels, where there are any, only say in the caption what most images of the cluster are.
    """
    embeddings, labels = extract(Embedding(model_from_weights(checkpoint)), source, image_size=image_size)
    points_ND = normalize(embeddings, dim=1).double().numpy()
    fitted = KMeans(clusters, n_init=10, random_state=seed).fit(points_ND)
    strips = []
    for cluster in np.argsort(-np.bincount(fitted.labels_, minlength=clusters)):
        members = np.flatnonzero(fitted.labels_ == cluster)
        distance = np.linalg.norm(points_ND[members] - fitted.cluster_centers_[cluster], axis=1)
        typical = members[np.argsort(distance)][:SHOWN]
        caption = f"{len(members)} images" + mostly(labels.numpy()[members], source.classes)
        picture = strip([source.load(int(row)).permute(1, 2, 0).numpy() for row in typical])
        strips.append((caption, f"The {len(typical)} most typical of {caption}", picture))
    return tuple(strips)


def mostly(labels: np.ndarray, classes: list[str]) -> str:
    """Which class most images are of, as the end of a caption; "" where none has a label."""
    known = labels[labels >= 0]
    if not len(known):
        return ""
    counts = np.bincount(known)
    return f", {counts.max() / len(labels):.0%} are {classes[int(counts.argmax())]}"
