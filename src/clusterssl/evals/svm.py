"""Linear support vector machines on frozen features, with all labels or few (Goyal et al. 2019, section 4.1).

Features of unit length; one machine per class, positives weigh twice; the cost is chosen by cross-validation on the
training images alone. Suffixes: N images, F features, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from clusterssl import dist
from clusterssl.config import require_numbers
from clusterssl.errors import UserError
from clusterssl.evals.average_precision import IGNORED, RULES, class_precisions

_NEGATIVES = 19  # for each positive, when labels are few
_FOLDS = 3


@dataclass(frozen=True)
class SvmOptions:
    """Support vector machines."""

    svm: bool = False
    """linear support vector machines on frozen features instead of training the network"""
    svm_shots: tuple[int, ...] = (0,)
    """images that show a class to train its machine on; 0: all; as published 1 2 4 8 16 32 64 96"""
    svm_draws: int = 5
    """draws of these images, over which the result is averaged"""
    svm_costs: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0, 100.0)
    """candidates for the cost of an error; chosen by cross-validation, the middle one where there is one image"""

    def __post_init__(self) -> None:
        require_numbers(self, "svm_shots", least=0)
        require_numbers(self, "svm_draws", least=1)
        require_numbers(self, "svm_costs", above=0)


def svm_table(
    train_NF: NDArray[np.float64], train_labels_NC: NDArray[np.uint8], test_NF: NDArray[np.float64],
    test_labels_NC: NDArray[np.uint8], options: SvmOptions, seed: int,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """One row for every number of labels: mean average precisions in percent over the draws, and their spread."""
    for shots in options.svm_shots:
        draws = [
            svm_precisions(
                train_NF, train_labels_NC, test_NF, test_labels_NC, shots=shots, draw=draw, costs=options.svm_costs,
                seed=seed,
            )
            for draw in range(options.svm_draws if shots else 1)
        ]  # fmt: skip
        each = 100 * np.nanmean(np.stack(draws), axis=2)
        names = zip(("map", "map_11", "map_all"), each.mean(0).tolist(), strict=True)
        yield {"shots": shots, "draws": len(draws), **dict(names), "map_std": float(each[:, 0].std())}


def svm_precisions(
    train_NF: NDArray[np.float64], train_labels_NC: NDArray[np.uint8], test_NF: NDArray[np.float64],
    test_labels_NC: NDArray[np.uint8], *, shots: int, draw: int, costs: Sequence[float], seed: int,
) -> NDArray[np.float64]:  # fmt: skip
    """Average precision of every class by each of `RULES`, float64 [3, C], in 0..1.

    A collective: classes are shared out over the ranks.

    Args:
        train_NF, test_NF: features.
        train_labels_NC, test_labels_NC: 1, 0 or `IGNORED`.
        shots: positives of each class to train on, with 19 times as many negatives; 0: all images.
        draw: which draw of them.
        costs: candidates for the cost C.
        seed: of draws and folds.

    Raises:
        UserError: a class has fewer positives.
    """
    train_NF, test_NF = _unit(train_NF), _unit(test_NF)
    classes = train_labels_NC.shape[1]
    found = torch.zeros(len(RULES), classes, dtype=torch.float64)
    first, last = dist.share(classes)
    for c in range(first, last):
        rows = _drawn(train_labels_NC[:, c], shots, np.random.default_rng([seed, draw, shots, c]), c)
        machine = _machine(train_NF[rows], train_labels_NC[rows, c] == 1, costs, seed)
        score_N1 = machine.decision_function(test_NF)[:, None]
        for rule, name in enumerate(RULES):
            found[rule, c] = float(class_precisions(test_labels_NC[:, c : c + 1], score_N1, name)[0])
    return dist.all_reduce_(found).numpy()


def _unit(x_NF: NDArray[np.float64]) -> NDArray[np.float64]:
    return x_NF / np.maximum(np.linalg.norm(x_NF, axis=1, keepdims=True), 1e-12)


def _drawn(label_N: NDArray[np.uint8], shots: int, random: np.random.Generator, c: int) -> NDArray[np.int64]:
    """Training images of one class."""
    positives, negatives = np.flatnonzero(label_N == 1), np.flatnonzero(label_N == 0)
    least = max(shots, 1)
    if len(positives) < least or not len(negatives):
        raise UserError(
            f"--svm_shots {shots}: class number {c} has {len(positives)} images that show it and {len(negatives)} that "
            "do not; ask for fewer"
        )
    if not shots:
        return np.flatnonzero(label_N != IGNORED)
    taken = random.choice(positives, shots, replace=False)
    others = random.choice(negatives, min(_NEGATIVES * shots, len(negatives)), replace=False)
    return np.sort(np.concatenate([taken, others]))


def _machine(train_NF: NDArray[np.float64], positive_N: NDArray[np.bool_], costs: Sequence[float], seed: int) -> Any:
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.svm import LinearSVC

    machine = LinearSVC(class_weight={True: 2.0, False: 1.0}, max_iter=2000, dual=False)
    folds = min(_FOLDS, int(positive_N.sum()), int((~positive_N).sum()))
    if folds < 2 or len(costs) == 1:
        return machine.set_params(C=costs[len(costs) // 2]).fit(train_NF, positive_N)
    cross = StratifiedKFold(folds, shuffle=True, random_state=seed)
    return GridSearchCV(machine, {"C": list(costs)}, scoring="average_precision", cv=cross).fit(train_NF, positive_N)
