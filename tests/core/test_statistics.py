"""Intervals and tests against closed forms and scipy; coverage on simulated data."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hybridengine.evaluate.statistics import (
    bootstrap_interval,
    mcnemar,
    paired_bootstrap,
    resampled_means,
    rows_interval,
    wilson_interval,
)


def scores(n: int, share: float) -> np.ndarray:
    return np.concatenate([np.ones(round(n * share)), np.zeros(n - round(n * share))])


@pytest.mark.parametrize(("n", "share"), [(100, 0.5), (1180, 0.908), (400, 0.97)])
@pytest.mark.parametrize("method", ["bca", "percentile"])
def test_interval_of_an_accuracy_is_near_wilsons(n, share, method):
    low, high = rows_interval(scores(n, share), resamples=4000, method=method)
    expected = wilson_interval(round(n * share), n)
    # The two differ by O(1/n), and quantiles of 4,000 resamples by some 4% of the half width.
    assert low == pytest.approx(expected[0], abs=2 / n + 0.004)
    assert high == pytest.approx(expected[1], abs=2 / n + 0.004)


def test_rows_that_repeat_count_as_often_as_they_occur():
    # Rare large values: their leave-one-out means must weigh as little as they are rare.
    rows = np.concatenate([np.zeros(180), np.ones(15), np.full(5, 8.0)])
    low, high = rows_interval(rows, resamples=50_000)
    scipys = stats.bootstrap((rows,), np.mean, n_resamples=50_000, rng=np.random.default_rng(1)).confidence_interval
    # An end's standard error at 50,000 resamples is some 0.01 of the standard error 0.09; steps are 1/200.
    assert (low, high) == pytest.approx((scipys.low, scipys.high), abs=0.006)


@pytest.mark.parametrize("method", ["bca", "percentile"])
def test_interval_of_a_skewed_mean_agrees_with_scipy(method):
    rows = np.random.default_rng(0).exponential(size=80)
    ours = rows_interval(rows, resamples=20_000, method=method)
    scipys = stats.bootstrap(
        (rows,), np.mean, n_resamples=20_000, method={"bca": "BCa"}.get(method, method), rng=np.random.default_rng(1)
    ).confidence_interval
    # Two independent sets of 20,000 resamples: an end's standard error is about 0.02 of the standard error 0.11.
    assert ours == pytest.approx((scipys.low, scipys.high), abs=0.01)


def test_interval_of_a_ratio_agrees_with_scipy():
    rng = np.random.default_rng(2)
    rows = np.stack([rng.gamma(2, 3, 60), rng.integers(1, 9, 60)], axis=1)
    ours = rows_interval(rows, lambda m: m[:, 0] / m[:, 1], resamples=20_000)
    scipys = stats.bootstrap(
        (rows[:, 0], rows[:, 1]),
        lambda a, b, axis: a.mean(axis) / b.mean(axis),
        paired=True,
        n_resamples=20_000,
        rng=np.random.default_rng(1),
    ).confidence_interval
    width = scipys.high - scipys.low
    assert ours == pytest.approx((scipys.low, scipys.high), abs=0.03 * width)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    hits = 0
    for seed in range(200):
        rows = (np.random.default_rng(seed).random(150) < 0.8).astype(float)
        low, high = rows_interval(rows, resamples=500, seed=seed)
        hits += low <= 0.8 <= high
    # Binomial(200, 0.95) is below 178 with probability 2e-4; discreteness costs a point or two of coverage.
    assert hits >= 178


def test_same_seed_same_interval_and_order_of_equal_rows_is_irrelevant():
    rows = scores(300, 0.7)
    assert rows_interval(rows, seed=5) == rows_interval(rows[::-1], seed=5)
    assert rows_interval(rows, seed=5) != rows_interval(rows, seed=6)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(2, 60), seed=st.integers(0, 99))
def test_both_ways_of_resampling_have_the_right_moments(n, seed):
    for rows in (np.random.default_rng(seed).normal(size=(n, 2)), np.ones((n, 2)) * (np.arange(n) % 2)[:, None]):
        means = resampled_means(rows, 3000, seed)
        error = rows.std(0) / np.sqrt(n)
        # Five standard errors of a mean, and a spread within 10%, of 3,000 resamples.
        assert (abs(means.mean(0) - rows.mean(0)) <= 5 * error / np.sqrt(3000) + 1e-12).all()
        np.testing.assert_allclose(means.std(0), error, rtol=0.1, atol=1e-12)


def test_multinomial_and_index_draws_give_one_distribution():
    few = scores(500, 0.3)  # two distinct rows: multinomial
    many = few + np.arange(500) * 1e-9  # all distinct: indices
    a, b = (np.sort(resampled_means(x.reshape(-1, 1), 5000, 1)[:, 0]) for x in (few, many))
    # Kolmogorov-Smirnov at level 1e-4 for two samples of 5,000, plus the steps of size 1/500.
    assert abs(a - b).max() < 0.01
    assert stats.ks_2samp(np.round(a, 3), np.round(b, 3)).pvalue > 1e-4


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_all_right_or_all_wrong_gives_wilsons_interval_not_a_point(value):
    low, high = rows_interval(np.full(50, value))
    assert (low, high) == wilson_interval(int(50 * value), 50)
    assert (low if value == 0 else high) == value and high - low > 0.05


def test_what_has_no_interval():
    assert rows_interval(np.ones(1)) is None
    assert rows_interval(np.zeros((5, 2)), lambda m: m[:, 0] / np.where(m[:, 1] == 0, np.nan, 1)) is None
    with pytest.raises(ValueError, match="bca"):
        rows_interval(np.ones(3), method="BCA")


@settings(max_examples=50, deadline=None)
@given(total=st.integers(1, 3000), data=st.data(), confidence=st.sampled_from([0.9, 0.95, 0.99]))
def test_wilson_agrees_with_scipy(total, data, confidence):
    successes = data.draw(st.integers(0, total))
    expected = stats.binomtest(successes, total).proportion_ci(confidence, method="wilson")
    assert wilson_interval(successes, total, confidence) == pytest.approx((expected.low, expected.high), abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(a=st.lists(st.booleans(), min_size=1, max_size=200), seed=st.integers(0, 99))
def test_mcnemar_is_the_exact_binomial_test(a, seed):
    b = np.random.default_rng(seed).random(len(a)) < 0.6
    found = mcnemar(np.array(a), b)
    total = found.only_a + found.only_b
    expected = stats.binomtest(min(found.only_a, found.only_b), total).pvalue if total else 1.0
    assert found.p_value == pytest.approx(expected, rel=1e-9)


def test_paired_differences_ignore_what_both_share():
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 10, 300)
    a, b = hard + rng.normal(0.5, 1, 300), hard + rng.normal(0, 1, 300)
    found = paired_bootstrap(a, b)
    assert found.difference == pytest.approx(np.mean(a - b))
    error = np.std(a - b) / np.sqrt(300)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert found.p_value < 0.01
    same = paired_bootstrap(a, a)
    assert (same.difference, same.low, same.high, same.p_value) == (0, 0, 0, 1)
    with pytest.raises(ValueError, match="paired"):
        paired_bootstrap(a, b[:-1])


def test_an_interval_from_metrics_uses_their_statistic():
    class Ratio:
        def row_scores(self):
            return np.stack([np.arange(50.0), np.full(50, 2.0)], axis=1)

        def statistic(self):
            return lambda means: means[:, 0] / means[:, 1]

    low, high = bootstrap_interval(Ratio(), resamples=1000)
    assert low < 49 / 4 < high
