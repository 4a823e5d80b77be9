"""Scores of ranked lists of images, as the Oxford and Paris benchmarks count them.

Suffixes: Q queries, N database images, P positives of a query.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from clusterssl.evals.groundtruth import LEVELS, GroundTruth


def places_of(
    order_N: NDArray[np.int64], positives_P: NDArray[np.int64], skipped: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Places of the positives in a ranked list from which the skipped images are taken out, ascending, from 0.

    Args:
        order_N: database positions, best first.
        positives_P: database positions.
        skipped: database positions.
    """
    kept = order_N[~np.isin(order_N, skipped)]
    return np.flatnonzero(np.isin(kept, positives_P))


def trapezoid_precision(places_P: NDArray[np.int64]) -> float:
    """Average precision: every recall step times the mean of the precisions before and after the positive.

    The first of them is preceded by precision 1, as in the Oxford Buildings program (Philbin et al. 2007).

    Args:
        places_P: places of all positives, ascending, from 0.

    Returns:
        In 0..1; NaN without positives.
    """
    if not len(places_P):
        return float("nan")
    number_P = np.arange(len(places_P))
    before_P = np.where(places_P > 0, number_P / np.maximum(places_P, 1), 1.0)
    return float(((before_P + (number_P + 1) / (places_P + 1)) / 2).mean())


def precision_at(places_P: NDArray[np.int64], k: int) -> float:
    """Share of positives among the first k images, or among those up to the last positive where that is earlier.

    As in the revisited benchmarks (Radenovic et al. 2018); NaN without positives.
    """
    if not len(places_P):
        return float("nan")
    reach = min(int(places_P[-1]) + 1, k)
    return float((places_P < reach).sum()) / reach


def evaluate(order_QN: NDArray[np.int64], truth: GroundTruth, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Mean over the queries with a positive, in percent.

    Returns:
        {"map_<level>": ..., "mp<k>_<level>": ...} for easy, medium, hard; or for "all" without them: {"map": ...}.
    """
    found: dict[str, float] = {}
    for level in LEVELS[truth.protocol]:
        pairs = zip(order_QN, truth.positives(level), strict=True)
        places = [places_of(order_N, positive, skipped) for order_N, (positive, skipped) in pairs]
        places = [each for each in places if len(each)]
        end = "" if level == "all" else f"_{level}"
        found[f"map{end}"] = 100 * float(np.mean([trapezoid_precision(each) for each in places] or [np.nan]))
        for k in ks:
            found[f"mp{k}{end}"] = 100 * float(np.mean([precision_at(each, k) for each in places] or [np.nan]))
    return found
