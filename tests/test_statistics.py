"""Intervals hold their coverage, and tests their size, in simulation at the sample sizes that are used."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from safesteer.evaluation.statistics import effective, mean, measure, paired_p, paired_rates, perplexity, rate, wilson

SAMPLES = 2000
Draw = Callable[[np.random.Generator, int], np.ndarray]

SHAPES: dict[str, tuple[Draw, float]] = {
    "symmetric": (lambda chance, n: chance.normal(1.0, 1.0, n), 1.0),
    "skewed": (lambda chance, n: chance.gamma(2.0, 1.0, n), 2.0),  # as negative log-likelihoods are
    "long tail": (lambda chance, n: chance.lognormal(0.0, 0.6, n), float(np.exp(0.18))),  # as KL is
    "mostly zero": (lambda chance, n: chance.gamma(2.0, 1.0, n) * (chance.random(n) < 0.25), 0.5),  # as gated KL is
}


def covered(make: Callable[[np.random.Generator], tuple[float, float]], truth: float) -> float:
    """The share of samples whose interval holds the truth."""
    chance = np.random.default_rng(0)
    hits = 0
    for _ in range(SAMPLES):
        low, high = make(chance)
        hits += low <= truth <= high
    return hits / SAMPLES


@pytest.mark.parametrize(
    ("shape", "n"),
    [("symmetric", 6), ("symmetric", 12), ("skewed", 12), ("skewed", 24), ("long tail", 24), ("long tail", 48),
     ("mostly zero", 48), ("mostly zero", 192)],
)  # fmt: skip
def test_the_interval_of_a_mean_covers_it_in_95_of_100_samples(shape: str, n: int) -> None:
    draw, truth = SHAPES[shape]

    def one(chance: np.random.Generator) -> tuple[float, float]:
        found = mean(list(draw(chance, n)))
        return found.low, found.high

    assert 0.93 <= covered(one, truth) <= 0.97


def _clustered(chance: np.random.Generator, clusters: int, size: int, share: float) -> np.ndarray:
    """0 or 1 for each of `size` wrappings of each prompt; prompts differ in how often they succeed."""
    of_prompt = chance.beta(2 * share, 2 * (1 - share), clusters)
    return (chance.random((clusters, size)) < of_prompt[:, None]).astype(float).ravel()


@pytest.mark.parametrize(("clusters", "size", "share"), [(12, 18, 0.3), (24, 6, 0.5), (60, 3, 0.2)])
def test_the_interval_of_a_rate_over_wrappings_covers_it(clusters: int, size: int, share: float) -> None:
    names = list(np.repeat(np.arange(clusters), size))

    def one(chance: np.random.Generator) -> tuple[float, float]:
        found = rate(list(_clustered(chance, clusters, size, share)), names)
        return found.low, found.high

    assert 0.93 <= covered(one, share) <= 0.97

    def as_if_independent(chance: np.random.Generator) -> tuple[float, float]:
        found = rate(list(_clustered(chance, clusters, size, share)))
        return found.low, found.high

    assert covered(as_if_independent, share) < 0.9  # what it was: this simulation can tell


def test_the_paired_difference_over_wrappings_covers_it() -> None:
    names = list(np.repeat(np.arange(24), 6))

    def one(chance: np.random.Generator) -> tuple[float, float]:
        values, control = _clustered(chance, 24, 6, 0.2), _clustered(chance, 24, 6, 0.4)
        found = paired_rates(list(values), list(control), names)
        return found.low, found.high

    assert 0.93 <= covered(one, -0.2) <= 0.97


def test_the_interval_of_a_mean_over_wrappings_covers_it() -> None:
    names = list(np.repeat(np.arange(24), 6))

    def one(chance: np.random.Generator) -> tuple[float, float]:
        found = mean(list(np.repeat(chance.gamma(2.0, 1.0, 24), 6) + chance.normal(0, 1, 24 * 6)), names)
        return found.low, found.high

    assert 0.93 <= covered(one, 2.0) <= 0.97


def test_rows_that_each_stand_for_themselves_have_the_plain_intervals() -> None:
    values = [1.0, 0.0, 0.0, 1.0, 1.0]
    assert rate(values, list("abcde")) == rate(values) == wilson(3, 5)
    assert mean(values, list("abcde")) == mean(values)
    assert effective(values, list("aabbb")) < effective(values, None) == 5


def test_wrappings_that_all_say_the_same_are_worth_as_many_rows_as_there_are_prompts() -> None:
    assert rate([0.0] * 36, ["a"] * 18 + ["b"] * 18).high == wilson(0, 2).high
    assert rate([0.0] * 36, ["a"] * 36).high == wilson(0, 1).high


def test_a_measure_takes_the_clusters_of_its_prompts_and_of_the_pairs() -> None:
    values = {number: float(number % 12 < 6) for number in range(36)}
    control = dict.fromkeys(values, 1.0)
    alone = measure(values, control, True)
    together = measure(values, control, True, {number: number % 12 for number in values})
    assert alone is not None and together is not None and alone.difference is not None
    assert together.difference is not None and together.value == alone.value
    assert together.high - together.low > alone.high - alone.low
    assert together.difference.high - together.difference.low > alone.difference.high - alone.difference.low


def test_the_paired_test_of_rates_is_the_exact_test_of_mcnemar() -> None:
    for more, less in ((6, 0), (5, 1), (5, 0), (3, 3)):
        values = [1.0] * more + [0.0] * less + [1.0] * 4
        control = [0.0] * more + [1.0] * less + [1.0] * 4
        assert paired_p(values, control) == pytest.approx(stats.binomtest(more, more + less).pvalue)
    assert paired_p([1.0, 0.0], [1.0, 0.0]) == 1.0


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_paired_test_finds_nothing_in_nothing_more_than_once_in_20_times(wrapped: bool) -> None:
    chance = np.random.default_rng(0)
    found = 0
    for _ in range(300):
        values, control = _clustered(chance, 10, 6, 0.4), _clustered(chance, 10, 6, 0.4)
        names = list(np.repeat(np.arange(10), 6)) if wrapped else None
        if not wrapped:
            values, control = values[::6], control[::6]
        found += paired_p(list(values), list(control), names) < 0.05
    assert found / 300 <= 0.07


def test_one_bad_text_of_many_does_not_decide_a_perplexity() -> None:
    """One text of 192 at e^50 made the mean of the others 2.7e19."""
    found = mean([2.0] * 191 + [50.0])
    assert perplexity(found.value) == pytest.approx(np.exp(2.25))
