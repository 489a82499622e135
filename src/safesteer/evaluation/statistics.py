"""Intervals and tests. 95%; nothing is drawn but the sign flips, and those are seeded.

    rate             Wilson score interval (1927)
    two rates        of the same prompts: Newcombe's score interval of the paired difference (1998, method 10)
    mean             Hall's transformed t (1992), which takes the skewness out:  W = (mean - mu) / s,  T = sqrt(n) g(W),
                         g(W) = W + a W^2 + a^2 W^3 / 3 + k / (6 n),   a = k / 3,   k the sample's skewness
    difference       the same of a_i - b_i, both values of one prompt
    paired test      sign flips of a_i - b_i: exact for few prompts, and McNemar's exact test where the values are 0 or 1
    perplexity       exp of the mean negative log-likelihood: the geometric mean over responses

Rows of one cluster (wrappings of one prompt, samples of one answer) are not independent. Means and differences take the
variance between cluster totals (G clusters, G - 1 degrees of freedom); rates an effective number of rows in place of n,

    n / deff * (z / t)^2,    deff = G / (G - 1) * sum_g r_g^2 / sum_i r_i^2,   at least 1

r_i being a row's difference to the rate and r_g its sum over a cluster (Korn and Graubard 1998). Where every row is a cluster of
its own, these are the plain intervals.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from safesteer.evaluation.results import Interval, Measure

Z = 1.959964
ERROR = 0.05  # p from which on nothing is called shown
FLIPS = 9999

Key = TypeVar("Key", bound=Hashable)
Clusters = Sequence[Hashable] | None


def _totals(values: np.ndarray[Any, Any], clusters: Clusters) -> np.ndarray[Any, Any]:
    """The sum of `values` over each cluster (over each row by itself: None)."""
    if clusters is None:
        return values
    numbers: dict[Hashable, int] = {}
    slots = [numbers.setdefault(one, len(numbers)) for one in clusters]
    totals: np.ndarray[Any, Any] = np.bincount(slots, values)
    return totals


def _quantile(degrees: int) -> float:
    """Student's t at 97.5%."""
    from scipy import stats

    return float(stats.t.ppf(0.975, degrees))


def effective(values: Sequence[float], clusters: Clusters) -> float:
    """How many independent rows the values 0 or 1 of clustered rows are worth, for the interval of their rate."""
    data = np.asarray(values, dtype=np.float64)
    residuals = data - data.mean()
    totals = _totals(residuals, clusters)
    rows, groups = len(data), len(totals)
    if groups == rows or groups == 1:
        return float(groups)
    squares = float(residuals @ residuals)
    if squares == 0:
        return float(groups)
    deff = max(1.0, groups / (groups - 1) * float(totals @ totals) / squares)
    return max(1.0, rows / deff * (Z / _quantile(groups - 1)) ** 2)


def wilson(count: float, total: float) -> Interval:
    """A rate with its Wilson interval; total must be above 0."""
    rate, square = count / total, Z * Z / total
    middle, half = rate + square / 2, Z * math.sqrt(max(0.0, rate * (1 - rate)) / total + square / total / 4)
    low, high = (middle - half) / (1 + square), (middle + half) / (1 + square)
    return Interval(value=rate, low=min(rate, max(0.0, low)), high=max(rate, min(1.0, high)))


def rate(values: Sequence[float], clusters: Clusters = None) -> Interval:
    """The rate of values 0 or 1 with its interval; `values` must not be empty."""
    share = sum(values) / len(values)
    rows = effective(values, clusters)
    return wilson(share * rows, rows).model_copy(update={"value": share})


def mean(values: Sequence[float], clusters: Clusters = None) -> Interval:
    """A mean with its interval; `values` must not be empty. A single value, or cluster, says nothing of the others: no width."""
    data = np.asarray(values, dtype=np.float64)
    middle = float(data.mean())
    totals = _totals(data - middle, clusters)
    groups, second = len(totals), float(np.mean(totals**2))
    if groups < 2 or second <= (1e-12 * max(1.0, abs(middle))) ** 2:
        return Interval(value=middle, low=middle, high=middle)
    error = math.sqrt(groups / (groups - 1) * groups * second) / len(data)
    skew = float(np.mean(totals**3)) / second**1.5
    quantile, root = _quantile(groups - 1), math.sqrt(groups)

    def back(t: float) -> float:
        """g inverted, in standard errors."""
        w = t / root - skew / (6 * groups)
        return float(root * (w if abs(skew) < 1e-6 else 3 * (np.cbrt(1 + skew * w) - 1) / skew))

    return Interval(
        value=middle,
        low=min(middle, middle - error * back(quantile)),
        high=max(middle, middle - error * back(-quantile)),
    )


def paired_rates(values: Sequence[float], control: Sequence[float], clusters: Clusters = None) -> Interval:
    """The difference of two rates over the same prompts (values 0 or 1), with Newcombe's interval; both must not be empty."""
    n = len(values)
    both = sum(a == b == 1 for a, b in zip(values, control, strict=True))
    neither = sum(a == b == 0 for a, b in zip(values, control, strict=True))
    first, second = round(sum(values)), round(sum(control))
    rows = effective([a - b for a, b in zip(values, control, strict=True)], clusters)
    one, other = wilson(first / n * rows, rows), wilson(second / n * rows, rows)
    product = first * (n - first) * second * (n - second)
    cross = float(both * neither - (first - both) * (second - both))
    if cross > 0:
        cross = max(0.0, cross - n / 2)  # continuity correction
    correlation = cross / math.sqrt(product) if product else 0.0
    below, above = one.value - one.low, one.high - one.value
    other_below, other_above = other.value - other.low, other.high - other.value
    difference = (first - second) / n
    low = math.sqrt(max(0.0, below**2 - 2 * correlation * below * other_above + other_above**2))
    high = math.sqrt(max(0.0, above**2 - 2 * correlation * above * other_below + other_below**2))
    return Interval(value=difference, low=max(-1.0, difference - low), high=min(1.0, difference + high))


def paired_difference(values: Sequence[float], control: Sequence[float], clusters: Clusters = None) -> Interval:
    """Mean of values minus control with its interval; item i of both belongs to the same prompt."""
    return mean([a - b for a, b in zip(values, control, strict=True)], clusters)


def paired_p(values: Sequence[float], control: Sequence[float], clusters: Clusters = None) -> float:
    """Two-sided p of the sign-flip test that values and control of the same prompts differ by nothing but chance."""
    from scipy import stats

    differences = np.subtract(np.asarray(values, dtype=np.float64), np.asarray(control, dtype=np.float64))
    totals = _totals(differences, clusters)
    totals = totals[totals != 0]
    if len(totals) < 2:
        return 1.0
    found = stats.permutation_test(
        (totals,), np.mean, permutation_type="samples", vectorized=True, n_resamples=FLIPS, rng=0
    )
    return float(found.pvalue)


def perplexity(nll: float) -> float:
    """The geometric mean of perplexities, from a mean negative log-likelihood in nats; of a difference of these, the ratio."""
    return float(np.exp(nll))


def measure(
    values: Mapping[Key, float],
    control: Mapping[Key, float] | None,
    rates: bool,
    clusters: Mapping[Key, Hashable] | None = None,
) -> Measure | None:
    """A rate (values 0 or 1) or a mean by prompt, with its difference to `control` on the prompts that both have.

    `clusters`: what each prompt is a case of, by prompt (None: each stands for itself). None without values; no difference
    without a control or a shared prompt.
    """
    if not values:
        return None

    def grouped(keys: Sequence[Key]) -> Clusters:
        return None if clusters is None else [clusters[key] for key in keys]

    interval = (rate if rates else mean)(list(values.values()), grouped(list(values)))
    shared = [key for key in values if control is not None and key in control]
    difference = None
    if control is not None and shared:
        compare = paired_rates if rates else paired_difference
        difference = compare([values[key] for key in shared], [control[key] for key in shared], grouped(shared))
    return Measure(**interval.model_dump(), n=len(values), difference=difference)
