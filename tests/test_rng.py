"""Counter-based random numbers."""

from __future__ import annotations

import numpy as np
from scipy import stats

from clusterssl.rng import Stream, permutation, uniform


def test_rows_depend_on_their_own_key_only() -> None:
    together = uniform(3, Stream.CROPS, [5, 5, 6], [10, 11, 10], 40)
    for row, (epoch, index) in enumerate([(5, 10), (5, 11), (6, 10)]):
        np.testing.assert_array_equal(uniform(3, Stream.CROPS, epoch, [index], 40)[0], together[row])
    np.testing.assert_array_equal(uniform(3, Stream.CROPS, 5, [10], 7)[0], together[0, :7])


def test_every_part_of_the_key_changes_the_draws() -> None:
    base = uniform(3, Stream.CROPS, 5, [10], 16)
    others = [(4, Stream.CROPS, 5, 10), (3, Stream.ORDER, 5, 10), (3, Stream.CROPS, 6, 10), (3, Stream.CROPS, 5, 11)]
    others += [(5, Stream.CROPS, 3, 10), (-1, Stream.CROPS, 5, 10), (2**70, Stream.CROPS, 5, 10)]
    for seed, stream, epoch, index in others:
        assert not np.isin(uniform(seed, stream, epoch, [index], 16), base).any()


def test_uniform_and_uncorrelated() -> None:
    u = uniform(31, Stream.CROPS, 0, np.arange(20_000), 12)
    assert u.min() >= 0 and u.max() < 1
    for column in u.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-4
    correlation = np.corrcoef(np.concatenate([u[:-1].T, u[1:].T]))
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 5 / np.sqrt(len(u))
    epochs = np.concatenate([uniform(31, Stream.CROPS, e, np.arange(1000), 1) for e in range(20)])
    assert stats.kstest(epochs.ravel(), "uniform").pvalue > 1e-4


def test_permutation() -> None:
    order = permutation(31, Stream.ORDER, 4, 5000)
    np.testing.assert_array_equal(np.sort(order), np.arange(5000))
    np.testing.assert_array_equal(order, permutation(31, Stream.ORDER, 4, 5000))
    assert abs(stats.spearmanr(order, np.arange(5000)).statistic) < 0.06
    assert (order == permutation(31, Stream.ORDER, 5, 5000)).mean() < 0.01
