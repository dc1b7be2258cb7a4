"""Intervals cover the truth, and tests refuse true hypotheses, at their stated rates, with three seeds too.

Rates are those of RUNS simulated comparisons. A bound is three standard errors of such a rate away from what it bounds,
so each assertion fails by chance with a probability below 0.002; the random numbers are the same every time.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from es_engine.compare.statistics import (
    area,
    cost_to_reach,
    difference,
    holm,
    mean_interval,
    median_cost,
    share_interval,
    value_at,
)

Array = npt.NDArray[np.float64]

RUNS = 1000
LEVEL_OF_TRUTH = -0.4
SIZES = [(3, 64), (3, 256), (5, 64), (10, 64)]
MIXES = [(0.0, 1.0, 1.0), (0.1, 1.0, 1.0), (0.2, 1.0, 0.5), (0.5, 0.5, 1.0), (0.1, 0.0, 1.0)]
"""Standard deviations of seeds, of problems, and of what neither explains."""


def simulate(seeds: int, problems: int, mix: tuple[float, float, float], key: int = 0) -> Array:
    """Score tables (RUNS, S, P) around LEVEL_OF_TRUTH."""
    rng = np.random.default_rng([seeds, problems, key])
    of_seeds, of_problems, of_both = mix
    return (
        LEVEL_OF_TRUTH
        + of_seeds * rng.standard_normal((RUNS, seeds, 1))
        + of_problems * rng.standard_normal((RUNS, 1, problems))
        + of_both * rng.standard_normal((RUNS, seeds, problems))
    )


def rate_error(rate: float) -> float:
    """Three standard errors of a rate."""
    return 3 * math.sqrt(rate * (1 - rate) / RUNS)


@pytest.mark.parametrize(("seeds", "problems"), SIZES)
@pytest.mark.parametrize("mix", MIXES)
def test_intervals_of_means_cover_at_their_rate(seeds: int, problems: int, mix: tuple[float, float, float]) -> None:
    scores = simulate(seeds, problems, mix)
    found = mean_interval(scores)
    covered = np.mean((found.low <= LEVEL_OF_TRUTH) & (found.high >= LEVEL_OF_TRUTH))
    assert 0.945 - rate_error(0.945) <= covered <= 0.995
    for bar in (0.0, 1.5):  # the second is rarely passed, by 5% or less
        right = (scores > bar).astype(np.float64)
        truth = stats.norm.cdf((LEVEL_OF_TRUTH - bar) / math.hypot(*mix))
        shares = share_interval(right)
        covered = np.mean((shares.low <= truth) & (shares.high >= truth))
        assert 0.935 - rate_error(0.935) <= covered <= 0.998
        assert np.all((shares.low >= 0) & (shares.low <= shares.mean) & (shares.mean < shares.high))


def test_neither_normal_quantiles_nor_seeds_alone_would_cover() -> None:
    scores = simulate(3, 256, (0.2, 1.0, 0.5))
    means = scores.mean(axis=(1, 2))
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 3, (200, 3))
    resampled = scores.mean(axis=2)[:, drawn].mean(axis=2)
    low, high = np.percentile(resampled, [2.5, 97.5], axis=1)
    assert np.mean((low <= LEVEL_OF_TRUTH) & (high >= LEVEL_OF_TRUTH)) < 0.8
    errors = scores.mean(axis=2).std(axis=1, ddof=1) / math.sqrt(3)
    assert np.mean(np.abs(means - LEVEL_OF_TRUTH) <= 1.96 * errors) < 0.85


@pytest.mark.parametrize(("seeds", "problems"), SIZES)
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("binary", [False, True])
def test_identical_methods_come_out_as_not_different(
    seeds: int, problems: int, mix: tuple[float, float, float], binary: bool
) -> None:
    of_seeds, of_problems, of_both = mix
    shared = simulate(1, problems, (0.0, of_problems, 0.0))
    tables = [shared + simulate(seeds, problems, (of_seeds, 0.0, of_both), key) for key in (1, 2)]
    one, other = [(table > LEVEL_OF_TRUTH).astype(np.float64) if binary else table for table in tables]
    found = difference(one, other)
    refused = np.mean(found.p <= 0.05)
    assert refused <= 0.055 + rate_error(0.055)
    assert np.mean(found.p <= 0.2) <= 0.2 + rate_error(0.2)
    assert np.array_equal(found.p <= 0.05, (found.low > 0) | (found.high < 0))


def test_a_difference_covers_where_seeds_and_problems_differ_between_methods() -> None:
    shared = simulate(1, 128, (0.0, 1.0, 0.0))
    one = shared + simulate(3, 128, (0.1, 0.3, 0.5), key=1)
    other = shared + simulate(5, 128, (0.3, 0.3, 0.5), key=2) + 0.25
    found = difference(other, one)
    covered = np.mean((found.low <= 0.25) & (found.high >= 0.25))
    assert 0.94 - rate_error(0.94) <= covered <= 0.985


def test_pairing_over_problems_sees_what_two_intervals_would_not() -> None:
    shared = simulate(1, 64, (0.0, 1.0, 0.0))
    one, other = (shared + simulate(3, 64, (0.0, 0.0, 0.3), key) + shift for key, shift in ((1, 0.0), (2, 0.2)))
    assert np.mean(mean_interval(one).high > mean_interval(other).low) > 0.9
    assert np.mean(difference(other, one).p < 0.05) > 0.9


def test_a_mean_without_spread() -> None:
    assert mean_interval(np.full((3, 8), 0.5)).low == mean_interval(np.full((3, 8), 0.5)).high == 0.5
    none, all_right = share_interval(np.zeros((3, 64))), share_interval(np.ones((3, 64)))
    assert (none.low, all_right.high) == (0, 1)
    assert none.high == pytest.approx(0.06, abs=0.003)
    assert all_right.low == pytest.approx(1 - none.high)
    assert difference(np.ones((3, 8)), np.ones((2, 8))).p == 1
    assert difference(np.ones((3, 8)), np.zeros((3, 8))).p < 1e-9
    assert difference(np.full((3, 100), 0.1), np.full((2, 100), 0.1)).p == 1  # though their means differ by rounding


def test_one_seed_shows_no_spread_of_seeds() -> None:
    scores = simulate(1, 16, MIXES[0])[0]
    for found in (mean_interval(scores), share_interval((scores > 0) * 1.0), difference(scores, scores[::-1] + 1)):
        assert np.isnan([found.low, found.high]).all()
    assert np.isnan(difference(scores, scores + 1).p)


def test_holm_is_worked_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_keeps_the_order_and_never_gives_less(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert all(p <= q <= 1 for p, q in zip(p_values, adjusted, strict=True))
    assert [adjusted[place] for place in np.argsort(p_values)] == sorted(adjusted)


def test_area_is_the_mean_height_over_the_budget() -> None:
    costs = [0.0, 10.0, 30.0]
    assert area(costs, np.array([0.0, 1.0, 1.0]), 30) == pytest.approx(25 / 30)
    assert area(costs, np.array([0.0, 1.0, 0.0]), 20) == pytest.approx((5 + 7.5) / 20)
    assert area(costs, np.array([0.0, 1.0, 0.5]), 60) == pytest.approx((5 + 15 + 15) / 60)
    assert area([0.0, 0.0, 0.0], np.array([0.1, 0.5, 0.9]), 10) == 0.9  # spends nothing of the budget
    assert area([0.0, 10.0, 20.0, 20.0], np.array([0.0, 0.4, 0.4, 0.8]), 20) == pytest.approx(0.3)  # a last stage, too
    assert area([0.0, 10.0, 20.0, 20.0], np.array([0.0, 0.4, 0.4, 0.8]), 40) == pytest.approx(0.55)
    several = area(costs, np.array([[0.0, 0.5], [1.0, 0.5], [1.0, 0.5]]), 30)
    assert several == pytest.approx([25 / 30, 0.5])


def test_a_value_at_a_cost_lies_on_the_line_between_evaluations() -> None:
    costs, values = [0.0, 10.0, 30.0], np.array([[0.0, 1.0], [1.0, 1.0], [0.5, 0.0]])
    assert value_at(costs, values, 5).tolist() == [0.5, 1]
    assert value_at(costs, values, 20).tolist() == [0.75, 0.5]
    for cost in (0, 5, 10, 12, 29, 30, 99):
        expected = [np.interp(cost, costs, values[:, column]) for column in (0, 1)]
        assert value_at(costs, values, cost) == pytest.approx(expected)


def test_a_value_where_costs_stand_still_is_that_of_the_last_evaluation() -> None:
    assert value_at([0.0, 0.0], np.array([0.2, 0.6]), 1) == 0.6
    assert value_at([0.0, 10.0, 10.0], np.array([0.2, 0.4, 0.8]), 10) == 0.8
    assert value_at([0.0, 10.0, 10.0, 20.0], np.array([0.2, 0.4, 0.8, 0.6]), 10) == 0.8
    assert value_at([0.0, 10.0, 10.0, 20.0], np.array([0.2, 0.4, 0.8, 0.6]), 15) == pytest.approx(0.7)


def test_cost_to_reach_is_that_of_the_first_crossing() -> None:
    costs, values = [0.0, 10.0, 20.0, 30.0], [0.1, 0.3, 0.2, 0.9]
    assert cost_to_reach(costs, values, 0.1) == 0
    assert cost_to_reach(costs, values, 0.2) == pytest.approx(5)
    assert cost_to_reach(costs, values, 0.55) == pytest.approx(25)
    assert cost_to_reach(costs, values, 0.95) is None


def test_the_median_cost_counts_seeds_that_never_got_there() -> None:
    assert median_cost([3.0, None, 1.0]) == 3
    assert median_cost([None, None, 1.0]) is None
    assert median_cost([1.0, None]) is None
    assert median_cost([1.0, 2.0]) == 1.5
    assert median_cost([None, None]) is None
