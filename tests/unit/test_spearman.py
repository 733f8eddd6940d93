"""Spearman's correlation and its interval agree with SciPy and with the definition."""

import math

import numpy as np
import pytest

from megatron.infer.spearman import spearman, spearman_interval


@pytest.mark.parametrize("num_values", [2, 3, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_ties_or_none_it_is_scipys(num_values, seed):
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(seed)
    first = generator.integers(num_values, size=200).astype(float)
    second = first * generator.normal(size=200)
    assert spearman(first, second) == pytest.approx(stats.spearmanr(first, second).statistic, abs=1e-12)


def test_it_is_known_where_it_can_be_told_by_hand():
    assert spearman(np.array([1.0, 2, 3]), np.array([10.0, 20, 1e9])) == pytest.approx(1)
    assert spearman(np.array([1.0, 2, 3]), np.array([3.0, 2, 1])) == pytest.approx(-1)
    assert spearman(np.array([1.0, 1, 2]), np.array([1.0, 2, 3])) == pytest.approx(1.5 / math.sqrt(1.5 * 2))
    assert math.isnan(spearman(np.array([1.0, 1, 1]), np.array([1.0, 2, 3])))


def test_what_is_no_number_has_no_rank():
    assert math.isnan(spearman(np.array([1.0, math.nan, 2]), np.array([1.0, 2, 3])))
    assert spearman(np.array([1.0, 2, math.inf]), np.array([1.0, 2, 3])) == pytest.approx(1)


def test_the_interval_is_that_of_pairs_drawn_and_ranked_again():
    generator = np.random.default_rng(0)
    first = generator.integers(8, size=40).astype(float)
    second = first + generator.normal(scale=4, size=40)
    again, found = np.random.default_rng(0), []
    for _ in range(1000):
        drawn = again.integers(40, size=40)
        found.append(spearman(first[drawn], second[drawn]))
    assert spearman_interval(first, second) == pytest.approx(np.quantile(found, [0.025, 0.975]))


def test_the_interval_holds_the_true_correlation_about_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr("megatron.infer.spearman._RESAMPLES", 100)
    generator, hits = np.random.default_rng(1), 0
    true = 6 / math.pi * math.asin(0.6 / 2)  # of normal variables with a correlation of 0.6
    for _ in range(60):
        first, other = generator.normal(size=(2, 80))
        low, high = spearman_interval(first, 0.6 * first + 0.8 * other)
        hits += low <= true <= high
    assert 52 <= hits < 60  # an interval of everything would have all
