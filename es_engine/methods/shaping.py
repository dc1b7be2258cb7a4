"""From rewards to the weights of members in an ES update.

Shapes: rewards (N, P), one row a member, NaN where a rollout has no score; weights (N,).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Shaping = Literal["centered_rank", "zscore", "per_prompt"]


def fitness(rewards: Array) -> Array:
    """Each member's mean reward over its scored rollouts, shape (N,); NaN where it has none."""
    scored = ~np.isnan(rewards)
    counts = scored.sum(axis=1)
    sums = np.where(scored, rewards, 0.0).sum(axis=1)
    return np.divide(sums, counts, out=np.full(len(rewards), np.nan), where=counts > 0)


def with_means(rewards: Array, sharers: int) -> Array:
    """Rewards in which a missing score is the mean of those that the same problem got: so many members side by side
    answer the same problems. To go without a score is then neither good nor bad, as in GRPO; a mean over what is scored
    would be the higher for the lack of a problem that nobody solves. Members without any score stay as they are, and so
    does a problem without one."""
    groups = rewards.reshape(-1, sharers, rewards.shape[1])
    scored = ~np.isnan(groups)
    counts = np.broadcast_to(scored.sum(axis=1, keepdims=True), groups.shape)
    sums = np.where(scored, groups, 0.0).sum(axis=1, keepdims=True)
    missing = ~scored & scored.any(axis=2, keepdims=True) & (counts > 0)
    return np.divide(sums, counts, out=groups.copy(), where=missing).reshape(rewards.shape)


def with_lowest(*rewards: Array) -> list[Array]:
    """Rewards, of any shapes, with the lowest of them all where there is none, zeros where nothing has one. Were such
    left out, what gives few answers that can be scored might seem the best."""
    scored = [each[~np.isnan(each)] for each in rewards]
    lowest = min((each.min() for each in scored if len(each)), default=0.0)
    return [np.where(np.isnan(each), lowest, each) for each in rewards]


def shape(rewards: Array, shaping: Shaping) -> Array | None:
    """The members' weights, zero for members without a score; None where the population has no spread to learn from."""
    values = fitness(_centred_on_prompts(rewards) if shaping == "per_prompt" else rewards)
    present = ~np.isnan(values)
    scored = without_rounding_errors(values[present], rewards)
    if len(scored) < 2 or np.ptp(scored) == 0:
        return None
    weights = np.zeros(len(values))
    weights[present] = _transform(scored, shaping)
    return weights


def spread(values: Array) -> float | None:
    """Standard deviation of fitness (N,) over scored members, exactly 0 where they are equal; None without any."""
    scored = values[~np.isnan(values)]
    if len(scored) == 0:
        return None
    settled = without_rounding_errors(scored, scored)
    return float(np.std(settled - settled[0]))


def without_rounding_errors(values: Array, rewards: Array) -> Array:
    """Values, of any shape, to 40 bits of the largest reward: means of the same rewards, or sums of parts, in another
    order must tie."""
    largest = np.abs(np.nan_to_num(rewards)).max()
    unit = np.ldexp(1.0, max(np.frexp(largest)[1] - 40, -1000))  # a power of two, so that dividing by it is exact
    return np.asarray(np.round(values / unit) * unit)


def _transform(values: Array, shaping: Shaping) -> Array:
    if shaping == "centered_rank":
        return centered_ranks(values)
    if shaping == "zscore":
        return np.asarray((values - values.mean()) / values.std())
    return np.asarray(values - values.mean())


def centered_ranks(values: Array) -> Array:
    """Ranks mapped onto [-1/2, 1/2] (Salimans et al., arXiv 1703.03864); equal values share the mean of their ranks."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts) - 1
    mean_rank = last - (counts - 1) / 2
    return np.asarray(mean_rank[group] / (len(values) - 1) - 0.5)


def _centred_on_prompts(rewards: Array) -> Array:
    """Rewards less each prompt's mean over the population, so that a missing score does not tilt a member's mean."""
    scored = ~np.isnan(rewards)
    means = np.where(scored, rewards, 0.0).sum(axis=0) / np.maximum(scored.sum(axis=0), 1)
    return np.asarray(rewards - means)
