"""Intervals and comparisons of metrics by resampling rows: bootstrap, paired bootstrap, Wilson, McNemar.

A metric is a function of the means of a few numbers per row, `[n, k]` (accuracy: 0/1 and the identity; macro F1: hits,
predictions and truths of each class). Hence resampling needs no second look at predictions, only new means.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from hybridengine.seams.randomness import mix
from hybridengine.seams.task import Metrics

__all__ = [
    "Comparison",
    "McNemar",
    "bootstrap_interval",
    "identity",
    "mcnemar",
    "paired_bootstrap",
    "resampled_means",
    "rows_interval",
    "wilson_interval",
]

Array = NDArray[np.float64]
Statistic = Callable[[Array], Array]
_CHUNK = 4_000_000  # draws held at once
_NORMAL = NormalDist()


def identity(means: Array) -> Array:
    """The statistic of a metric that is itself a mean."""
    return means[:, 0]


def resampled_means(rows: Array, resamples: int, seed: int) -> Array:
    """Column means `[R, k]` of `resamples` draws of n rows with replacement, a function of rows and seed alone.

    Where few distinct rows exist (0/1 scores), how often each is drawn is one multinomial draw: the same distribution,
    at a cost that does not grow with n.
    """
    rng = np.random.default_rng(mix(seed, "bootstrap", rows.shape))
    size = len(rows)
    distinct, counts = np.unique(rows, axis=0, return_counts=True)
    if len(distinct) * 10 < size:
        drawn = rng.multinomial(size, counts / size, size=resamples)
        return np.asarray(drawn @ distinct / size)
    return np.concatenate([drawn @ rows / size for drawn in _draws(rng, size, resamples)])


def _draws(rng: np.random.Generator, size: int, resamples: int) -> Iterator[Array]:
    """How often each row is drawn, `[r, n]` at a time."""
    step = max(1, _CHUNK // size)
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        picks = rng.integers(0, size, (count, size)) + np.arange(count)[:, None] * size
        yield np.bincount(picks.ravel(), minlength=count * size).reshape(count, size).astype(np.float64)


def bootstrap_interval(
    metrics: Metrics, *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float] | None:
    """The BCa bootstrap interval of a split's main metric; see `rows_interval`."""
    rows, statistic = metrics.row_scores(), metrics.statistic()
    return rows_interval(rows, statistic, resamples=resamples, confidence=confidence, seed=seed)


def rows_interval(
    rows: Array,
    statistic: Statistic = identity,
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
    method: str = "bca",
) -> tuple[float, float] | None:
    """A bootstrap confidence interval of a metric; the same for the same rows and seed.

    `bca` corrects the percentile interval for bias and skewness (Efron 1987) and falls back to it where a correction
    is undefined. Where every row scores 0, or every row 1, resampling shows no spread; the Wilson interval is given.

    Args:
        rows: numbers per row, `[n]` or `[n, k]`.
        statistic: from means `[R, k]` to the metric `[R]`.
        method: `bca` or `percentile`.

    Returns:
        Lower and upper end, or None for fewer than two rows or where the metric is undefined.
    """
    if method not in ("bca", "percentile"):
        raise ValueError(f"method must be 'bca' or 'percentile', not {method!r}")
    table = np.asarray(rows, dtype=np.float64).reshape(len(rows), -1)
    if len(table) < 2:
        return None
    if table.shape[1] == 1 and (table == table[0]).all() and table[0, 0] in (0.0, 1.0):
        return wilson_interval(int(table.sum()), len(table), confidence)
    values = np.asarray(statistic(resampled_means(table, resamples, seed)))
    values = np.sort(values[np.isfinite(values)])
    if not len(values):
        return None
    tail = (1 - confidence) / 2
    low, high = _bca_levels(table, statistic, values, tail) if method == "bca" else (tail, 1 - tail)
    return float(np.quantile(values, low)), float(np.quantile(values, high))


def _bca_levels(table: Array, statistic: Statistic, values: Array, tail: float) -> tuple[float, float]:
    """The quantiles that BCa reads instead of `tail` and `1 - tail`."""
    mean, size = table.mean(0), len(table)
    observed = float(statistic(mean[None])[0])
    below = (np.count_nonzero(values < observed) + np.count_nonzero(values <= observed)) / (2 * len(values))
    distinct, counts = np.unique(table, axis=0, return_counts=True)
    without = statistic((size * mean - distinct) / (size - 1))
    spread = np.average(without, weights=counts) - without
    squares = float((counts * spread**2).sum())
    if not (0 < below < 1 and math.isfinite(squares) and squares > 0):
        return tail, 1 - tail
    bias = _NORMAL.inv_cdf(below)
    skew = float((counts * spread**3).sum()) / (6 * squares**1.5)

    def level(z: float) -> float:
        return _NORMAL.cdf(bias + (bias + z) / (1 - skew * (bias + z)))

    return level(_NORMAL.inv_cdf(tail)), level(_NORMAL.inv_cdf(1 - tail))


def wilson_interval(successes: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927); sound also at 0 and 1.

    Raises:
        ValueError: if there is nothing to count.
    """
    if not 0 <= successes <= total or total == 0:
        raise ValueError(f"{successes} successes of {total} are no proportion")
    z = _NORMAL.inv_cdf((1 + confidence) / 2)
    share = successes / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    # At 0 and 1 the end is exact; rounding would leave it at 1e-17.
    return 0.0 if successes == 0 else centre - half, 1.0 if successes == total else centre + half


@dataclass(frozen=True)
class Comparison:
    """The difference of two systems on the same rows, `a - b`, with its interval and two-sided bootstrap p-value."""

    difference: float
    low: float
    high: float
    p_value: float


def paired_bootstrap(
    a: Array,
    b: Array,
    statistic: Statistic = identity,
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Compare two systems on the same rows: each resample draws the same rows for both.

    Args:
        a: numbers per row `[n]` or `[n, k]` of one system; `b` those of the other, rows in the same order.
        statistic: from means `[R, k]` to the metric `[R]`.

    Raises:
        ValueError: if the systems were not evaluated on equally many rows.
    """
    left, right = (np.asarray(x, dtype=np.float64).reshape(len(x), -1) for x in (a, b))
    if left.shape != right.shape or not len(left):
        raise ValueError(f"paired rows expected, got {left.shape} and {right.shape}")
    width = left.shape[1]
    both = np.concatenate([left, right], axis=1)
    means = resampled_means(both, resamples, seed)
    values = statistic(means[:, :width]) - statistic(means[:, width:])
    observed = float(statistic(left.mean(0)[None])[0] - statistic(right.mean(0)[None])[0])
    tail = (1 - confidence) / 2
    low, high = (float(np.quantile(values, level)) for level in (tail, 1 - tail))
    extreme = min(np.count_nonzero(values <= 0), np.count_nonzero(values >= 0))
    return Comparison(observed, low, high, min(1.0, 2 * (extreme + 1) / (resamples + 1)))


@dataclass(frozen=True)
class McNemar:
    """Rows that only one of two systems gets right, and the exact two-sided p-value of that split."""

    only_a: int
    only_b: int
    p_value: float


def mcnemar(a: Array, b: Array) -> McNemar:
    """McNemar's exact test of two systems' 0/1 correctness on the same rows (McNemar 1947).

    Under the null each discordant row is a fair coin, so the p-value is a two-sided binomial tail.
    """
    left, right = np.asarray(a, dtype=bool).ravel(), np.asarray(b, dtype=bool).ravel()
    if left.shape != right.shape:
        raise ValueError(f"paired rows expected, got {left.shape} and {right.shape}")
    only_a, only_b = int((left & ~right).sum()), int((right & ~left).sum())
    total, fewer = only_a + only_b, min(only_a, only_b)
    tail = sum(math.exp(_log_choose(total, k) - total * math.log(2)) for k in range(fewer + 1))
    return McNemar(only_a, only_b, min(1.0, 2 * tail))


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
