"""Rewards to weights."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy.stats import rankdata

from es_engine.methods.shaping import Shaping, centered_ranks, fitness, shape, spread, with_means

Array = npt.NDArray[np.float64]
NAN = float("nan")
SHAPINGS: tuple[Shaping, ...] = get_args(Shaping)

# Few different values, so that ties are common; NaN is a rollout without a score.
rewards_of_a_population = arrays(
    np.float64,
    array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=8),
    elements=st.sampled_from([0.0, 0.1, 0.2, 0.3, 1.0, float("nan")]),
)
whole_numbers = arrays(np.float64, st.integers(2, 40), elements=st.integers(-8, 8).map(float))


@given(whole_numbers)
def test_ranks_are_scipys_with_ties_sharing_the_mean(values: Array) -> None:
    expected = (rankdata(values, method="average") - 1) / (len(values) - 1) - 0.5
    np.testing.assert_allclose(centered_ranks(values), expected, atol=1e-12)


@given(whole_numbers)
def test_ranks_do_not_change_under_increasing_maps(values: Array) -> None:
    for increasing in (np.exp, np.arctan, lambda x: x**3, lambda x: 2 * x - 5):
        assert np.array_equal(centered_ranks(increasing(values)), centered_ranks(values))
    np.testing.assert_allclose(centered_ranks(-values), -centered_ranks(values), atol=1e-12)


@pytest.mark.parametrize("shaping", SHAPINGS)
@given(rewards=rewards_of_a_population, seed=st.integers(0, 2**32 - 1))
def test_weights_follow_their_members(shaping: Shaping, rewards: Array, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(rewards))
    weights, moved = shape(rewards, shaping), shape(rewards[order], shaping)
    if weights is None:
        assert moved is None
    else:
        assert moved is not None
        np.testing.assert_allclose(moved, weights[order], atol=1e-9)


@pytest.mark.parametrize("shaping", SHAPINGS)
@given(rewards=rewards_of_a_population, seed=st.integers(0, 2**32 - 1))
def test_the_order_of_prompts_does_not_matter(shaping: Shaping, rewards: Array, seed: int) -> None:
    """In floating point 0.1 + 0.2 + 0.3 is not 0.3 + 0.2 + 0.1: a rank must not hang on that."""
    rng = np.random.default_rng(seed)
    shuffled = (
        rng.permuted(rewards, axis=1) if shaping != "per_prompt" else rewards[:, rng.permutation(rewards.shape[1])]
    )
    weights, moved = shape(rewards, shaping), shape(shuffled, shaping)
    assert (weights is None) == (moved is None)
    if weights is not None and moved is not None:
        np.testing.assert_allclose(moved, weights, atol=1e-9)


@pytest.mark.parametrize("shaping", SHAPINGS)
@given(rewards=rewards_of_a_population)
def test_weights_of_scored_members_sum_to_zero(shaping: Shaping, rewards: Array) -> None:
    weights = shape(rewards, shaping)
    unscored = np.isnan(rewards).all(axis=1)
    if weights is None:
        return
    assert np.isfinite(weights).all()
    assert not weights[unscored].any()
    assert weights.any()
    if shaping != "per_prompt" or not np.isnan(rewards).any():
        assert abs(weights.sum()) < 1e-9


@pytest.mark.parametrize("shaping", SHAPINGS)
@given(row=st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.3, 1.0]), min_size=1, max_size=9), count=st.integers(1, 9))
def test_members_that_score_alike_give_no_weights(shaping: Shaping, row: list[float], count: int) -> None:
    assert shape(np.tile(row, (count, 1)), shaping) is None


def test_equal_means_of_rewards_in_another_order_are_equal() -> None:
    rewards = np.array([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1], [0.2, 0.3, 0.1]])
    assert len(set(fitness(rewards))) > 1  # the trap: these means differ in their last bit
    assert all(shape(rewards, shaping) is None for shaping in SHAPINGS)
    weights = shape(np.vstack([rewards, [1, 1, 1]]), "centered_rank")
    assert weights is not None
    np.testing.assert_allclose(weights, [-1 / 6, -1 / 6, -1 / 6, 1 / 2])


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_small_differences_of_rewards_of_any_size_count(size: float) -> None:
    rewards = size * np.array([[1.0], [1.0 + 1e-9], [1.0 - 1e-9]])
    weights = shape(rewards, "centered_rank")
    assert weights is not None
    np.testing.assert_allclose(weights, [0, 0.5, -0.5])


def test_a_missing_score_is_the_mean_of_those_who_answered_the_same() -> None:
    rewards = np.array([[1.0, NAN], [NAN, 2.0], [3.0, NAN], [8.0, 4.0], [NAN, NAN], [0.0, NAN]])
    everyone = with_means(rewards, sharers=6)
    np.testing.assert_array_equal(everyone, [[1, 3], [3, 2], [3, 3], [8, 4], [NAN, NAN], [0, 3]])
    pairs = with_means(rewards, sharers=2)
    np.testing.assert_array_equal(pairs, [[1, 2], [1, 2], [3, 4], [8, 4], [NAN, NAN], [0, NAN]])
    np.testing.assert_array_equal(with_means(rewards, sharers=1), rewards)
    assert np.isnan(rewards).sum() == 6, "the rewards themselves are as they were"


def test_zscore() -> None:
    rewards = np.array([[1.0, 3.0], [0.0, 0.0], [5.0, 1.0]])
    means = np.array([2.0, 0.0, 3.0])
    weights = shape(rewards, "zscore")
    assert weights is not None
    np.testing.assert_allclose(weights, (means - means.mean()) / means.std())


def test_per_prompt_centres_every_prompt_on_the_population() -> None:
    rewards = np.array([[1.0, 10.0], [0.0, 14.0], [2.0, 12.0]])
    weights = shape(rewards, "per_prompt")
    assert weights is not None
    np.testing.assert_allclose(weights, [(0 - 2) / 2, (-1 + 2) / 2, (1 + 0) / 2])


def test_a_missing_score_does_not_make_a_member_look_better() -> None:
    """The hard prompt (second) has no score for the first member; per prompt, that leaves it as good as the second."""
    rewards = np.array([[1.0, math.nan], [1.0, 0.0], [0.0, 0.0]])
    per_prompt, ranks = shape(rewards, "per_prompt"), shape(rewards, "centered_rank")
    assert per_prompt is not None
    assert ranks is not None
    centred = np.array([1 / 3, (1 / 3 + 0) / 2, (-2 / 3 + 0) / 2])
    np.testing.assert_allclose(per_prompt, centred - centred.mean())
    np.testing.assert_allclose(ranks, [0.5, 0, -0.5])


def test_unscored_rollouts_and_members_are_left_out() -> None:
    nan = math.nan
    values = fitness(np.array([[1.0, nan, 0.0], [nan, nan, nan], [nan, 2.0, nan]]))
    np.testing.assert_array_equal(values, [0.5, nan, 2.0])
    weights = shape(np.array([[1.0], [nan], [2.0], [nan], [4.0]]), "centered_rank")
    assert weights is not None
    assert weights.tolist() == [-0.5, 0, 0, 0, 0.5]
    for rewards in ([[nan], [nan]], [[1.0], [nan]], [[nan, nan], [1.0, nan], [1.0, 1.0]]):
        assert shape(np.array(rewards), "centered_rank") is None


@given(value=st.floats(-1e6, 1e6), count=st.integers(1, 60) | st.just(100_003))
def test_equal_members_have_no_spread(value: float, count: int) -> None:
    assert spread(np.full(count, value)) == 0.0


@given(values=arrays(np.float64, st.integers(1, 20), elements=st.integers(-100, 100).map(float)))
def test_spread_is_the_standard_deviation(values: Array) -> None:
    assume(np.ptp(values) > 0)
    with_gaps = np.append(values, [math.nan] * 3)
    assert spread(with_gaps) == pytest.approx(values.std(), rel=1e-9)
    assert spread(np.full(3, math.nan)) is None
