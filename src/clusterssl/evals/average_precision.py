"""Average precision of ranked lists, by the three rules in use for PASCAL VOC.

Suffixes: N images, C classes, T distinct scores, highest first.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Rule = Literal["area", "11-point", "all-point"]
RULES: tuple[Rule, ...] = ("area", "11-point", "all-point")

IGNORED = 255
_TIE = 1e-5


def average_precision(positive_N: ArrayLike, score_N: ArrayLike, rule: Rule = "area") -> float:
    """Average precision of one ranked list; images of equal score enter the list together.

    Args:
        positive_N: which images are positive.
        score_N: higher is earlier.
        rule: "area": sum of recall steps times precision, as scikit-learn; "11-point": mean over recalls 0, 0.1 .. 1 of
            the highest precision at that recall or beyond (VOC until 2009, Everingham et al. 2010, section 4.2);
            "all-point": area under the precision made falling (VOC from 2010 on).

    Returns:
        In 0..1; NaN without positives.
    """
    positive_N, score_N = np.asarray(positive_N, dtype=bool), np.asarray(score_N, dtype=np.float64)
    order = np.argsort(-score_N, kind="stable")
    last_of_ties = np.flatnonzero(np.r_[np.diff(score_N[order]) != 0, True])
    hits_T = np.cumsum(positive_N[order])[last_of_ties]
    positives = int(positive_N.sum())
    if not positives:
        return float("nan")
    precision_T = hits_T / (last_of_ties + 1)
    envelope_T = np.maximum.accumulate(precision_T[::-1])[::-1]
    if rule == "11-point":
        first = [np.searchsorted(10 * hits_T, tenth * positives) for tenth in range(11)]  # whole numbers: no rounding
        return float(envelope_T[first].mean())
    steps_T = np.diff(hits_T, prepend=0) / positives
    return float((steps_T * (precision_T if rule == "area" else envelope_T)).sum())


def class_precisions(labels_NC: NDArray[np.uint8], scores_NC: ArrayLike, rule: Rule = "area") -> NDArray[np.float64]:
    """Average precision of every class, float64 [C]; entries with label `IGNORED` are left out of their class.

    Ties count against the classifier, as published: positives lose 1e-5 before ranking.
    """
    scores_NC = np.asarray(scores_NC, dtype=np.float64)
    found = []
    for label_N, score_N in zip(labels_NC.T, scores_NC.T, strict=True):
        counted = label_N != IGNORED
        positive = label_N[counted] == 1
        found.append(average_precision(positive, score_N[counted] - _TIE * positive, rule))
    return np.array(found)


def mean_precisions(labels_NC: NDArray[np.uint8], scores_NC: ArrayLike) -> dict[str, float]:
    """Mean over the classes with a positive, in percent, by every rule: {"map": ..., "map_11": ..., "map_all": ...}.

    "map" is the area rule, by which DeepCluster's results are published.
    """
    names = {"map": "area", "map_11": "11-point", "map_all": "all-point"}
    return {key: 100 * float(np.nanmean(class_precisions(labels_NC, scores_NC, names[key]))) for key in names}  # type: ignore[arg-type]
