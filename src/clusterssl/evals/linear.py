"""Linear probes in memory: logistic regression on frozen features, with all labels or a few per class.

Protocol: features are standardised with the statistics of all training images (which needs no labels), then scaled to
unit mean square length, so that the strength of the penalty means the same for any kind of feature. The penalty is
chosen by cross-validation on the labelled images alone. Test images serve for nothing but the final count.

Legend of suffixes: N labelled images, M training images, Q test images, F features.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold

from clusterssl.errors import UserError

_PENALTIES = tuple(10.0**power for power in range(-1, 5))
_FOLDS = 5
_FIXED_C = 10.0


class FewLabels(NamedTuple):
    """Accuracy with few labels, in percent: mean over the draws of labelled images, and each draw's."""

    mean: float
    each: tuple[float, ...]


def draw_labels(labels_N: ArrayLike, labels_per_class: int, *, seed: int, draw: int = 0) -> NDArray[np.int64]:
    """Positions of `labels_per_class` random images of every class, ascending; a function of its arguments alone.

    Raises:
        UserError: a class has fewer images.
    """
    labels_N = np.asarray(labels_N)
    random = np.random.default_rng([seed, draw])
    chosen = []
    for label in np.unique(labels_N[labels_N >= 0]):
        positions = np.flatnonzero(labels_N == label)
        if len(positions) < labels_per_class:
            raise UserError(
                f"--labels_per_class {labels_per_class}: class {label} has only {len(positions)} images; ask for fewer"
            )
        chosen.append(random.choice(positions, labels_per_class, replace=False))
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def probe_accuracy(
    train_NF: ArrayLike,
    train_labels_N: ArrayLike,
    test_QF: ArrayLike,
    test_labels_Q: ArrayLike,
    *,
    unlabelled_MF: ArrayLike | None = None,
    C: float | None = None,
    seed: int = 0,
) -> float:
    """Test accuracy, in percent, of multinomial logistic regression by the protocol above.

    Args:
        train_NF: features of the labelled images; tensor or array.
        train_labels_N: their classes, two or more.
        test_QF: features of the test images.
        test_labels_Q: their classes.
        unlabelled_MF: features of all training images, for the statistics; `train_NF` when None.
        C: inverse penalty; None chooses among 0.1, 1 ... 10,000 the one of least log loss in 5-fold cross-validation
            on the labelled images (as many folds as the smallest class has images, 10 if that is one).
        seed: seed of the folds.
    """
    train_NF, test_QF = _array(train_NF), _array(test_QF)
    statistics_MF = train_NF if unlabelled_MF is None else _array(unlabelled_MF)
    labels_N = np.asarray(train_labels_N)
    train_NF, test_QF = _standardised(train_NF, test_QF, statistics_MF)
    model = _fit(train_NF, labels_N, C, seed)
    return 100.0 * float(np.mean(model.predict(test_QF) == np.asarray(test_labels_Q)))


def few_label_accuracy(
    train_MF: ArrayLike,
    train_labels_M: ArrayLike,
    test_QF: ArrayLike,
    test_labels_Q: ArrayLike,
    *,
    labels_per_class: int = 10,
    draws: int = 3,
    seed: int = 0,
) -> FewLabels:
    """Test accuracy of the probe when only `labels_per_class` training images of each class have a label.

    All M training features enter the statistics; draws with the same seed pick the same images whatever the features,
    so that kinds of features are compared on equal labels.

    Raises:
        UserError: a class has fewer images than asked for.
    """
    train_MF, labels_M = _array(train_MF), np.asarray(train_labels_M)
    each = []
    for draw in range(draws):
        chosen = draw_labels(labels_M, labels_per_class, seed=seed, draw=draw)
        each.append(
            probe_accuracy(
                train_MF[chosen], labels_M[chosen], test_QF, test_labels_Q, unlabelled_MF=train_MF, seed=seed
            )
        )
    return FewLabels(float(np.mean(each)), tuple(each))


def _array(features: ArrayLike) -> NDArray[np.float64]:
    return np.asarray(features, dtype=np.float64)


def _standardised(
    train_NF: NDArray[np.float64], test_QF: NDArray[np.float64], statistics_MF: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Standardise by column, then turn to the span of the labelled rows.

    The turn changes no result, since the weights of penalised logistic regression are combinations of the labelled
    rows; it makes thousands of columns as cheap as there are labelled images.
    """
    mean_F, deviation_F = statistics_MF.mean(0), statistics_MF.std(0)
    varies_F = deviation_F > 1e-9 * max(float(deviation_F.max()), 1e-300)
    scale_F = np.where(varies_F, deviation_F, np.inf) * np.sqrt(max(int(varies_F.sum()), 1))
    train_NF, test_QF = (train_NF - mean_F) / scale_F, (test_QF - mean_F) / scale_F
    if train_NF.shape[0] < train_NF.shape[1]:
        span_FR = np.linalg.qr(train_NF.T)[0]
        train_NF, test_QF = train_NF @ span_FR, test_QF @ span_FR
    return train_NF, test_QF


def _fit(
    train_NF: NDArray[np.float64], labels_N: NDArray[np.int64], inverse_penalty: float | None, seed: int
) -> LogisticRegression:
    folds = min(_FOLDS, int(np.unique(labels_N, return_counts=True)[1].min()))
    if inverse_penalty is not None or folds < 2:
        return LogisticRegression(C=inverse_penalty or _FIXED_C, max_iter=1000).fit(train_NF, labels_N)
    search = GridSearchCV(
        LogisticRegression(max_iter=1000),
        {"C": _PENALTIES},
        scoring="neg_log_loss",
        cv=StratifiedKFold(folds, shuffle=True, random_state=seed),
    )
    return search.fit(train_NF, labels_N).best_estimator_
