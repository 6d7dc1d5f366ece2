"""Quantiles, intervals and sample thresholds against independent sources."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from lenet_deploy import order_statistics
from lenet_deploy.order_statistics import (
    MIN_SAMPLES,
    mcnemar_exact,
    median,
    median_ci95,
    percentile,
    quantile,
    relative_iqr,
    wilson_ci95,
)

samples = st.lists(st.floats(0, 1e6), min_size=1, max_size=60)


@settings(deadline=None)
@given(samples, st.floats(0, 1))
def test_quantile_is_numpys_default(values: list[float], share: float) -> None:
    assert quantile(values, share) == pytest.approx(float(np.quantile(values, share)), rel=1e-9, abs=1e-6)


@settings(deadline=None)
@given(samples)
def test_median_is_numpys_and_needs_no_order(values: list[float]) -> None:
    assert median(values) == pytest.approx(float(np.median(values)), rel=1e-12)
    assert median(values[::-1]) == median(values)


@settings(deadline=None)
@given(samples)
def test_quantile_ends_are_the_extremes_and_a_mean_of_neighbours_lies_between(values: list[float]) -> None:
    assert quantile(values, 0.0) == min(values)
    assert quantile(values, 1.0) == max(values)
    assert min(values) <= quantile(values, 0.3) <= max(values)


def ranks(n: int) -> tuple[int, int]:
    """The one-based ranks that the interval takes from n samples."""
    interval = median_ci95([float(i) for i in range(1, n + 1)])
    assert interval is not None
    return (int(interval[0]), int(interval[1]))


@pytest.mark.parametrize("n", [6, 7, 8, 9, 10, 11, 20, 25, 50, 99, 100, 331, 1000])
def test_the_medians_interval_covers_at_least_95_percent_exactly(n: int) -> None:
    low, high = ranks(n)
    # The median lies between the ranks when at least `low` and fewer than `high` of n fair coins fall below it.
    coverage = sum(math.comb(n, k) for k in range(low, high)) / 2**n
    two_ranks_narrower = sum(math.comb(n, k) for k in range(low + 2, high - 2)) / 2**n
    assert coverage >= 0.95
    assert two_ranks_narrower < 0.95
    assert low + high == n + 1


def test_the_medians_interval_covers_the_true_median_of_a_skewed_law_in_simulation() -> None:
    random_numbers = random.Random(1)
    hits = 0
    for _ in range(4000):
        interval = median_ci95([random_numbers.expovariate(1.0) for _ in range(40)])
        assert interval is not None
        hits += interval[0] <= math.log(2) <= interval[1]
    assert 0.95 <= hits / 4000 <= 0.985


@pytest.mark.parametrize("n", range(1, 6))
def test_fewer_than_six_samples_have_no_interval(n: int) -> None:
    assert 1 - 2 * 0.5**n < 0.95  # not even the full range would cover the median
    assert median_ci95([1.0] * n) is None


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [  # Newcombe 1998, Statistics in Medicine 17, table I, method 3; the last two are closed forms
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (0, 10, 0.0, 3.8415 / 13.8415),
        (10, 10, 10 / 13.8415, 1.0),
    ],
)
def test_wilson_matches_published_values(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson_ci95(successes, trials) == pytest.approx((low, high), abs=1e-4)


@settings(deadline=None)
@given(st.integers(1, 10_000), st.data())
def test_wilson_stays_inside_zero_and_one_and_holds_the_share(trials: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, trials))
    low, high = wilson_ci95(successes, trials)
    assert 0.0 <= low <= high <= 1.0
    assert low - 1e-12 <= successes / trials <= high + 1e-12


def exact_p(first: int, second: int) -> float:
    """McNemar's exact test is a two-sided binomial test of one half on the discordant pairs."""
    return float(binomtest(first, first + second, 0.5).pvalue)


@pytest.mark.parametrize("second", range(15))
@pytest.mark.parametrize("first", range(15))
def test_mcnemar_is_scipys_binomial_test_on_the_discordant_pairs(first: int, second: int) -> None:
    expected = exact_p(first, second) if first + second else 1.0
    assert mcnemar_exact(first, second) == pytest.approx(expected, rel=1e-9)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.integers(0, 600), st.integers(0, 600))
def test_mcnemar_is_scipys_for_many_pairs_and_knows_no_first_and_second(first: int, second: int) -> None:
    found = mcnemar_exact(first, second)
    assert 0.0 <= found <= 1.0
    assert found == mcnemar_exact(second, first)
    if first + second:
        assert found == pytest.approx(exact_p(first, second), rel=1e-6, abs=1e-300)


def test_mcnemar_of_a_published_table() -> None:
    # Agresti, Categorical Data Analysis, table 10.1, approval ratings: 150 and 86 discordant pairs.
    assert mcnemar_exact(150, 86) == pytest.approx(3.7e-5, rel=0.02)
    assert mcnemar_exact(0, 6) == 2 / 2**6


@pytest.mark.parametrize(("percent", "needed"), MIN_SAMPLES.items())
def test_a_percentile_needs_its_number_of_samples(percent: float, needed: int) -> None:
    values = [float(i) for i in range(needed)]
    assert percentile(values[1:], percent) is None
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)))


def test_the_thresholds_are_loadgens() -> None:
    assert MIN_SAMPLES == {90: 64, 95: 130, 99: 662, 99.9: 6636}


def test_relative_iqr_is_zero_for_equal_samples_and_scale_free() -> None:
    spread = [1.0, 2.0, 3.0, 4.0, 5.0]
    assert relative_iqr([3.0] * 9) == 0.0
    assert relative_iqr(spread) == pytest.approx(2.0 / 3.0)
    assert relative_iqr([1000 * value for value in spread]) == pytest.approx(relative_iqr(spread))


def test_z95_is_the_normal_quantile() -> None:
    assert pytest.approx(1.959964, abs=1e-6) == order_statistics.Z95
