"""Intervals and tests over seeds and problems, which are crossed: every seed of a run answers the same problems.

Shapes: S seeds, P problems. A score table is (..., S, P); all functions work on stacks of tables.

The variance of a table's mean has a part of the seeds, one of the problems and one of what both leave over. The
bootstrap that draws seeds and problems anew (Owen, The pigeonhole bootstrap, 2007) estimates it; of a mean its variance
has a closed form, so nothing is drawn here, and the two biases that matter with few seeds are taken out: the factor
(S - 1)/S of resampling S seeds, and the remainder, which it counts three times. With row means r, column means c and
remainder e,

    V = var(r)/S + var(c)/P - var(e)/(SP),

but at least the larger of the first two. Its quantile is that of Cochran and Cox (Experimental Designs, 1957; Cochran,
Biometrics 1964): Student's t with S - 1 degrees of freedom and with P - 1, averaged with the weights of their parts of
V. It is a little wide where seeds hardly differ, and covers where they do, which the percentiles of a bootstrap of
three seeds do not. A difference of two runs is paired over problems and not over seeds, which have little in common
from one method to another; their seeds' parts are added with Welch's degrees of freedom.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

Array = npt.NDArray[np.float64]

LEVEL = 0.95
_LEAST_P = 1e-12
_ROUNDING = 1e-12
"""Means that differ by less of their size are equal: where no score differs, nothing else would hide their rounding."""


@dataclass(frozen=True, slots=True)
class Interval:
    """Means and the ends of their intervals, (...); NaN for ends where one seed, or one problem, shows no spread."""

    mean: Array
    low: Array
    high: Array


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean differences, the ends of their intervals and two-sided p values, (...)."""

    mean: Array
    low: Array
    high: Array
    p: Array


@dataclass(frozen=True, slots=True)
class _Spread:
    """The variance of a mean, the share in it of the seeds (the rest is the problems'), and the degrees of freedom that
    each of both is known with."""

    variance: Array
    seeds: Array
    seeds_freedom: Array
    problems_freedom: int

    def quantile(self, tail: Array | float) -> Array:
        """What a mean over its standard error exceeds with probability `tail` on one side."""
        of_seeds, of_problems = -stdtrit(self.seeds_freedom, tail), -stdtrit(self.problems_freedom, tail)
        return self.seeds * of_seeds + (1 - self.seeds) * of_problems


def mean_interval(scores: Array, level: float = LEVEL) -> Interval:
    """The mean of score tables (..., S, P) of any numbers."""
    mean, spread = scores.mean(axis=(-2, -1)), _spread(scores)
    half = spread.quantile((1 - level) / 2) * np.sqrt(spread.variance)
    return Interval(mean, mean - half, mean + half)


def share_interval(scores: Array, level: float = LEVEL) -> Interval:
    """The mean of score tables (..., S, P) of numbers from 0 to 1, such as accuracies.

    It is Wilson's interval at the effective sample size, the number of independent answers that would have the same
    variance (Korn and Graubard, Survey Methodology 1998; Dean and Pagano, J. Survey Stat. Methodol. 2015): it stays
    between 0 and 1, and where all scores are 0, or all 1, it is that of P answers.
    """
    seeds, problems = scores.shape[-2:]
    mean, spread = scores.mean(axis=(-2, -1)), _spread(scores)
    uniform = mean * (1 - mean)
    with np.errstate(divide="ignore", invalid="ignore"):
        size = np.clip(uniform / spread.variance, 1, seeds * problems)
    size = np.where((uniform <= 0) & ~np.isnan(spread.variance), problems, size)
    squared = spread.quantile((1 - level) / 2) ** 2
    middle = (mean + squared / (2 * size)) / (1 + squared / size)
    half = np.sqrt(squared * (uniform / size + squared / (4 * size**2))) / (1 + squared / size)
    return Interval(mean, np.maximum(0, middle - half), np.minimum(1, middle + half))


def difference(scores: Array, others: Array, level: float = LEVEL) -> Difference:
    """The mean of score tables (..., S, P) minus that of others (..., S', P) on the same problems; its p value is of
    the hypothesis that both methods score alike."""
    one, other = scores.mean(axis=(-2, -1)), others.mean(axis=(-2, -1))
    mean = np.where(np.isclose(one, other, rtol=_ROUNDING, atol=0), 0.0, one - other)
    spread = _spread(scores, others)
    error = np.sqrt(spread.variance)
    half = spread.quantile((1 - level) / 2) * error
    return Difference(mean, mean - half, mean + half, _p_value(mean, error, spread))


def _spread(scores: Array, others: Array | None = None) -> _Spread:
    """That of the mean of score tables, or of its difference to that of others on the same problems."""
    tables = [scores] if others is None else [scores, others]
    assert len({table.shape[-1] for table in tables}) == 1, "the runs share their problems"
    problems = scores.shape[-1]
    by_seed, rest = zip(*(_seeds_and_rest(table) for table in tables), strict=True)
    columns = scores.mean(axis=-2) if others is None else scores.mean(axis=-2) - others.mean(axis=-2)
    of_seeds, of_problems = sum(by_seed), _variance(columns) / problems
    with np.errstate(divide="ignore", invalid="ignore"):
        welch = sum(part**2 / (table.shape[-2] - 1) for part, table in zip(by_seed, tables, strict=True))
        freedom = np.where(of_seeds > 0, of_seeds**2 / welch, 1.0)
        share = np.where(of_seeds + of_problems > 0, of_seeds / (of_seeds + of_problems), 0.0)
    variance = np.maximum(of_seeds + of_problems - sum(rest), np.maximum(of_seeds, of_problems))
    return _Spread(variance, np.where(np.isnan(variance), np.nan, share), freedom, max(1, problems - 1))


def _seeds_and_rest(scores: Array) -> tuple[Array, Array]:
    """The parts of the variance of a mean that the spread of the seeds' means shows, and that of the remainder, which
    is in it; NaN where there is a single seed or problem."""
    seeds, problems = scores.shape[-2:]
    rows, columns = scores.mean(axis=-1, keepdims=True), scores.mean(axis=-2, keepdims=True)
    remainder = np.square(scores - rows - columns + rows.mean(axis=-2, keepdims=True)).sum(axis=(-2, -1))
    freedom = (seeds - 1) * (problems - 1)
    if freedom == 0:
        return np.full(remainder.shape, np.nan), np.full(remainder.shape, np.nan)
    return _variance(rows[..., 0]) / seeds, remainder / freedom / (seeds * problems)


def _variance(values: Array) -> Array:
    if values.shape[-1] < 2:
        return np.full(values.shape[:-1], np.nan)
    found: Array = values.var(axis=-1, ddof=1)
    return found


def _p_value(mean: Array, error: Array, spread: _Spread) -> Array:
    """The probability outside -|mean| to |mean|, by bisection of its logarithm; 1 where nothing differs."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(mean == 0, 0.0, np.abs(mean) / error)
    low, high = np.full(np.shape(mean), math.log(_LEAST_P)), np.zeros(np.shape(mean))
    for _ in range(40):
        middle = (low + high) / 2
        beyond = spread.quantile(np.exp(middle) / 2) > ratio
        low, high = np.where(beyond, middle, low), np.where(beyond, high, middle)
    return np.where(np.isnan(error), np.nan, np.exp(high))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values of as many tests, adjusted so that at level a one of all true hypotheses is refused with
    probability a at most (Holm, Scand. J. Statist. 1979)."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        largest = max(largest, min(1.0, p_values[place] * (len(p_values) - rank)))
        adjusted[place] = largest
    return adjusted


def value_at(costs: Sequence[float], values: Array, cost: float) -> Array:
    """The height at a cost of lines through values (E, ...) at costs that do not fall, the first 0; where they stand
    still, that of the last. Past the last point the lines go on level."""
    after = int(np.searchsorted(costs, cost, side="right"))
    if after == len(costs):
        return np.asarray(values[-1])
    part = (cost - costs[after - 1]) / (costs[after] - costs[after - 1])
    height: Array = values[after - 1] + part * (values[after] - values[after - 1])
    return height


def area(costs: Sequence[float], values: Array, budget: float) -> Array:
    """The mean height, over a budget, of curves through values (E, ...) at costs that do not fall, the first 0: the
    area of trapezoids over [0, budget] by the budget. Past the last point a curve goes on level."""
    inside = int(np.searchsorted(costs, budget))  # points before the budget's end
    end = value_at(costs[: inside + 1], values[: inside + 1], budget)
    areas: Array = np.trapezoid(np.concatenate([values[:inside], end[None]]), [*costs[:inside], budget], axis=0)
    return areas / budget


def cost_to_reach(costs: Sequence[float], values: Sequence[float], threshold: float) -> float | None:
    """The cost at which the line through the values first reaches a threshold; None if it never does."""
    if values[0] >= threshold:
        return float(costs[0])
    for place in range(1, len(values)):
        if values[place] >= threshold:
            part = (threshold - values[place - 1]) / (values[place] - values[place - 1])
            return float(costs[place - 1] + part * (costs[place] - costs[place - 1]))
    return None


def median_cost(costs: Sequence[float | None]) -> float | None:
    """The median over seeds, where one that never got there counts as more than any other; None where the median is
    such a one."""
    found = float(np.median([math.inf if cost is None else cost for cost in costs]))
    return None if math.isinf(found) or math.isnan(found) else found
