"""Evolution Strategies against closed forms, on functions of theta that stand in for rollouts."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from in_process import FunctionRunner, Reward, problems
from scipy import stats

from es_engine import noise
from es_engine.config import AdamConfig, EsMethodConfig, OptimizerConfig, SgdConfig
from es_engine.methods import population
from es_engine.methods.es import Estimate, EvolutionStrategies, whole_pairs
from es_engine.optimizers import build_optimizer
from workers.calls import Call
from workers.engine import Member, Sampling, Vector
from workers.perturbation import Perturber

SEED = 1  # of the runner's noise
NAN = float("nan")


def method(chunk: int = 4, **changes: Any) -> EvolutionStrategies:
    config = EsMethodConfig(**{"population": 8, "prompts": 1, "sigma": 0.1, **changes})
    sampling = Sampling(8, config.samples, config.temperature, config.top_p, ("\n",))
    return EvolutionStrategies(config, chunk=chunk, sampling=sampling)


def estimate(es: EvolutionStrategies, runner: FunctionRunner, theta: Vector, generation: int, sigma: float) -> Estimate:
    return es.estimate(runner, theta, generation, problems(es.batch_size), generation, sigma, len(theta))


def linear(gradient: npt.NDArray[np.float64], even: float = 0.0) -> Reward:
    """gradient . theta, and a part that is even in theta."""
    return lambda theta, _problem, _sample: float(gradient @ theta + even * np.square(theta, dtype=np.float64).sum())


def eps_of(generation: int, pairs: int, dim: int) -> npt.NDArray[np.float64]:
    return np.array([noise.draw(SEED, generation, pair, dim) for pair in range(pairs)], dtype=np.float64)


@pytest.mark.parametrize("even", [0.0, 50.0])
@pytest.mark.parametrize("sigma", [0.001, 0.1, 3.0])
def test_a_mirrored_linear_objective_is_exact(even: float, sigma: float) -> None:
    """direction = sigma^2 mean over pairs of (c . eps) eps, to float32 rounding; the even part cancels."""
    dim, generation = 300, 7
    gradient = np.random.default_rng(0).standard_normal(dim)
    es = method(shaping="per_prompt", population=12)
    runner = FunctionRunner(linear(gradient, even), dim)
    direction = estimate(es, runner, np.zeros(dim, dtype=np.float32), generation, sigma).direction
    eps = eps_of(generation, 6, dim)
    expected = sigma**2 * ((eps @ gradient)[:, None] * eps).mean(axis=0)
    assert direction is not None
    np.testing.assert_allclose(direction, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("shaping", ["per_prompt", "zscore", "centered_rank"])
@pytest.mark.parametrize("mirrored", [True, False])
def test_the_direction_is_the_weighted_mean_of_the_perturbations(shaping: str, mirrored: bool) -> None:
    """(sigma/N) sum w_i eps_i, with eps and the weights from their definitions."""
    dim, generation, sigma = 40, 3, 0.2
    gradient = np.random.default_rng(1).standard_normal(dim)
    center = noise.draw(9, 9, 9, dim)
    es = method(shaping=shaping, mirrored=mirrored)
    direction = estimate(es, FunctionRunner(linear(gradient), dim), center, generation, sigma).direction
    assert direction is not None
    eps = np.repeat(eps_of(generation, 4, dim), 2, axis=0) if mirrored else eps_of(generation, 8, dim)
    signs = np.array([1, -1] * 4 if mirrored else [1] * 8)
    values = (center + sigma * signs[:, None] * eps) @ gradient
    weights = {
        "per_prompt": values - values.mean(),
        "zscore": (values - values.mean()) / values.std(),
        "centered_rank": (stats.rankdata(values) - 1) / 7 - 0.5,
    }[shaping]
    expected = sigma / 8 * (weights * signs) @ eps
    np.testing.assert_allclose(direction, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("mirrored", [True, False])
def test_the_gradient_of_a_quadratic_is_estimated_without_bias(mirrored: bool) -> None:
    """Hotelling's T^2 over independent generations: error rate 1e-6, with a fixed seed.

    The smoothed objective of -1/2 (x-g)^T H (x-g) has the gradient -H (x-g). Without mirroring, subtracting the
    population's mean, of which each member is a part, scales the estimate by 1 - 1/N.
    """
    dim, sigma, repeats = 5, 0.5, 150
    rng = np.random.default_rng(2)
    root = rng.standard_normal((dim, dim))
    curvature, goal = root @ root.T / dim, rng.standard_normal(dim)
    center = rng.standard_normal(dim).astype(np.float32)

    def reward(theta: Vector, _problem: Any, _sample: int) -> float:
        return float(-0.5 * (theta - goal) @ curvature @ (theta - goal))

    es, runner = method(shaping="per_prompt", mirrored=mirrored), FunctionRunner(reward, dim)
    estimates = [estimate(es, runner, center, generation, sigma).direction for generation in range(repeats)]
    samples = np.array(estimates, dtype=np.float64) / sigma**2 / (1 if mirrored else 1 - 1 / 8)
    expected = -curvature @ (center - goal)
    assert t_squared_p(samples, expected) > 1e-6
    assert t_squared_p(samples, expected * 1.5) < 1e-6  # there is power to see a wrong scale
    assert t_squared_p(samples, np.roll(expected, 1)) < 1e-6


def t_squared_p(samples: npt.NDArray[np.float64], mean: npt.NDArray[np.float64]) -> float:
    count, dim = samples.shape
    gap = samples.mean(axis=0) - mean
    t_squared = count * gap @ np.linalg.solve(np.cov(samples.T), gap)
    return float(stats.f.sf(t_squared * (count - dim) / (dim * (count - 1)), dim, count - dim))


def hilly(theta: Vector, problem: Any, sample: int) -> float:
    """Something that is different for every theta, problem and sample."""
    return float(np.sin(theta.astype(np.float64) * (len(problem.prompt_ids) + sample / 7)).sum())


def whole_estimate(runner: FunctionRunner, chunk: int = 4, **changes: Any) -> Estimate:
    es = method(chunk, **{"population": 16, "prompts": 3, **changes})
    return estimate(es, runner, noise.draw(9, 9, 9, 500), 5, 0.3)


def test_the_largest_chunks_are_begun_first() -> None:
    """With prompts for each member, whose lengths grow from problem to problem, the last chunk is the largest."""
    runner = FunctionRunner(hilly, 500)
    record = whole_estimate(runner, sharing="member").record
    begun = [call.arguments[0].index for call in runner.calls if call.method == "evaluate"]
    assert begun == [3, 2, 1, 0]
    members = [[pair, sign] for pair in range(8) for sign in (1, -1)]
    assert record["members"] == members
    same = FunctionRunner(hilly, 500)
    whole_estimate(same)  # the same prompts for all: as they come
    assert [call.arguments[0].index for call in same.calls if call.method == "evaluate"] == [0, 1, 2, 3]


def test_who_evaluates_what_does_not_matter() -> None:
    alone = whole_estimate(FunctionRunner(hilly, 500))
    assert alone.direction is not None
    for workers, turn in [(2, 0), (2, 1), (3, 2), (9, 4)]:
        other = whole_estimate(FunctionRunner(hilly, 500, workers=workers, turn=turn))
        assert other.direction is not None
        assert other.direction.tobytes() == alone.direction.tobytes()
        kept = alone.record.keys() - {"times", "workers"}
        assert {key: other.record[key] for key in kept} == {key: alone.record[key] for key in kept}
        assert other.record["workers"] != alone.record["workers"]


def test_chunk_size_changes_only_rounding() -> None:
    reference = whole_estimate(FunctionRunner(hilly, 500), chunk=16)
    assert reference.direction is not None
    for chunk in (2, 6, 10, 100):
        other = whole_estimate(FunctionRunner(hilly, 500), chunk=chunk)
        assert other.direction is not None
        assert other.record["rewards"] == reference.record["rewards"]
        np.testing.assert_allclose(other.direction, reference.direction, atol=1e-6 * np.abs(reference.direction).max())


def test_the_noise_is_summed_by_the_worker_that_has_it() -> None:
    runner = FunctionRunner(hilly, 500, workers=3)
    record = whole_estimate(runner).record
    sums = [call for call in runner.calls if call.method == "noise_sum"]
    assert [call.preferred for call in sums] == record["workers"] == [0, 1, 2, 0]


@pytest.mark.parametrize("shaping", ["per_prompt", "zscore", "centered_rank"])
@pytest.mark.parametrize("broken", [False, True])
def test_a_replay_of_the_ledgers_line_is_the_estimate_bit_for_bit(shaping: str, broken: bool) -> None:
    """`broken`: some rollouts have no score."""

    def reward(theta: Vector, problem: Any, sample: int) -> float:
        return NAN if broken and theta[0] > 0 and len(problem.prompt_ids) > 1 else hilly(theta, problem, sample)

    changes: dict[str, Any] = {"shaping": shaping, "samples": 2, "temperature": 1.0}
    first = whole_estimate(FunctionRunner(reward, 500), **changes)
    line = json.loads(json.dumps({"kind": "generation", "step": 5, **first.record}, allow_nan=False))
    assert any(None in row for row in line["rewards"]) == broken
    replayed = method(4, population=16, prompts=3, **changes).replay(line, Perturber(SEED, 500, 1).noise_sum)
    assert first.direction is not None
    assert replayed is not None
    assert replayed.tobytes() == first.direction.tobytes()


def test_a_member_without_a_score_takes_its_mirror_image_with_it() -> None:
    """The rest of the population makes the step that it would have made alone."""
    dim, generation, sigma = 30, 4, 0.2
    gradient = np.random.default_rng(3).standard_normal(dim)
    eps = eps_of(generation, 6, dim)
    lost = np.float32(sigma) * noise.draw(SEED, generation, 2, dim)  # the + member of pair 2

    def reward(theta: Vector, problem: Any, sample: int) -> float:
        return NAN if np.array_equal(theta, lost) else linear(gradient)(theta, problem, sample)

    es = method(shaping="per_prompt", population=12, prompts=2)
    found = estimate(es, FunctionRunner(reward, dim), np.zeros(dim, dtype=np.float32), generation, sigma)
    kept = np.delete(eps, 2, axis=0)
    expected = sigma**2 * ((kept @ gradient)[:, None] * kept).mean(axis=0)
    assert found.direction is not None
    np.testing.assert_allclose(found.direction, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    assert found.record["rewards"][4] == [None, None]
    assert None not in found.record["rewards"][5]
    assert (found.record["unscored"], found.record["failures"]) == (2, {"mine": {"no score": 2}})


@pytest.mark.parametrize("lost", [4, 5])
def test_a_verifier_that_fails_most_rollouts_ends_the_run(lost: int) -> None:
    """4 members, 2 prompts: more than 4 of 8."""
    rewards = iter([NAN] * lost + [1.0] * (8 - lost))
    runner = FunctionRunner(lambda *_: next(rewards), 10)
    runner.workers[0].failure = "timeout"
    center = np.zeros(10, dtype=np.float32)
    if lost == 4:
        estimate(method(population=4, prompts=2), runner, center, 0, 0.1)
        return
    with pytest.raises(ValueError, match=r"^task: 5 of 8 rollouts .* \(mine: timeout 5\); one error: it hung$"):
        estimate(method(population=4, prompts=2), runner, center, 0, 0.1)


def test_only_members_without_any_score_are_taken_out() -> None:
    members = [Member(0, 1), Member(0, -1), Member(1, 1), Member(1, -1)]
    rewards = np.array([[NAN, 1.0], [2.0, 3.0], [NAN, NAN], [4.0, 5.0]])
    expected = np.array([[NAN, 1.0], [2.0, 3.0], [NAN, NAN], [NAN, NAN]])
    np.testing.assert_array_equal(whole_pairs(rewards, members), expected)
    assert rewards[3, 0] == 4.0
    alone = [Member(pair, 1) for pair in range(4)]
    np.testing.assert_array_equal(whole_pairs(rewards, alone), rewards)


@pytest.mark.parametrize(
    ("shaping", "sharing"),
    [
        ("per_prompt", "population"),
        ("zscore", "population"),
        ("centered_rank", "population"),
        ("zscore", "pair"),
        ("centered_rank", "pair"),
    ],
)
def test_nothing_is_gained_by_no_score_where_nobody_is_right(shaping: str, sharing: str) -> None:
    """A mean over scored problems is the higher for the lack of a hard one, so that ES would learn not to be scored."""

    def reward(theta: Vector, problem: Any, _sample: int) -> float:
        if int(problem.example.answer) % 2:
            return 1.0
        return NAN if theta[0] > 0 else 0.0

    es = method(prompts=2, shaping=shaping, sharing=sharing)
    found = estimate(es, FunctionRunner(reward, 10), np.zeros(10, dtype=np.float32), 0, 0.1)
    assert found.record["unscored"] > 0
    assert (found.direction, found.record["fitness_spread"]) == (None, 0.0)


@pytest.mark.parametrize("value", [0.0, 0.1, NAN])
def test_a_population_without_spread_makes_no_step(value: float) -> None:
    runner = FunctionRunner(lambda *_: value, 10)
    es = method(prompts=3)
    found = estimate(es, runner, np.zeros(10, dtype=np.float32), 0, 0.1)
    assert found.direction is None
    assert not [call for call in runner.calls if call.method == "noise_sum"]
    line = json.loads(json.dumps({"step": 0, **found.record}, allow_nan=False))
    assert line["fitness_spread"] == (None if np.isnan(value) else 0.0)
    assert es.replay(line, Perturber(SEED, 10, 1).noise_sum) is None


def test_the_record_tells_the_generation() -> None:
    def reward(theta: Vector, problem: Any, sample: int) -> float:
        return float(theta[0] > 0) + len(problem.prompt_ids)

    es = method(population=6, prompts=2, samples=3, temperature=1.0)
    found = estimate(es, FunctionRunner(reward, 4), np.zeros(4, dtype=np.float32), 1, 0.1)
    positive = [sign * noise.draw(SEED, 1, pair, 1)[0] > 0 for pair in range(3) for sign in (1, -1)]
    expected = {
        "sigma": 0.1,
        "members": [[0, 1], [0, -1], [1, 1], [1, -1], [2, 1], [2, -1]],
        "chunks": [4, 2],
        "prompts": ["p0", "p1"],
        "rewards": [[2.0, 3.0] if plus else [1.0, 2.0] for plus in positive],
        "reward_mean": 2.0,
        "reward_best": 2.5,
        "fitness_spread": 0.5,
        "accuracy": 1.0,
        "components": {"exact": 1.0},
        "constant_members": 0,
        "rollouts": 6 * 2 * 3,
        "tokens": 6 * 2 * 3 * 3,
        "prompt_tokens": 6 * (1 + 2),
        "truncated": 2,
        "looped": 4,
        "unscored": 0,
        "failures": {"mine": {"no score": 0}},
        "rescored": 0,
        "workers": [0, 0],
    }
    assert {key: found.record[key] for key in expected} == expected
    assert found.record.keys() - expected.keys() == {"times"}
    assert found.record["times"].keys() == {"generate", "noise", "rollouts", "update"}
    assert (found.record["times"]["generate"], found.record["times"]["noise"]) == (1.0, 0.5)
    assert found.costs.worker_seconds == 1.5


@pytest.mark.parametrize(
    ("sharing", "size", "places"),
    [
        ("population", 3, [(0, 1, 2)] * 4),
        ("pair", 6, [(0, 1, 2), (0, 1, 2), (3, 4, 5), (3, 4, 5)]),
        ("member", 12, [(0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 10, 11)]),
    ],
)
def test_who_shares_prompts(sharing: Any, size: int, places: list[tuple[int, ...]]) -> None:
    es = method(population=4, prompts=3, sharing=sharing, chunk=2)
    assert es.batch_size == size
    assert [places for chunk in es.chunks(0, 0.1) for places in chunk.problems] == places
    seen: list[str] = []

    def reward(_theta: Vector, problem: Any, _sample: int) -> float:
        seen.append(problem.example.id)
        return 0.0

    estimate(es, FunctionRunner(reward, 2), np.zeros(2, dtype=np.float32), 0, 0.1)
    assert sorted(seen) == sorted(f"p{place}" for row in places for place in row)


def test_populations() -> None:
    assert population.members(4, mirrored=True) == [Member(0, 1), Member(0, -1), Member(1, 1), Member(1, -1)]
    assert population.members(3, mirrored=False) == [Member(0, 1), Member(1, 1), Member(2, 1)]


@pytest.mark.parametrize("size", [2, 4, 6, 8, 10])
def test_chunks_hold_everyone_once_in_order_and_whole_pairs(size: int) -> None:
    chunks = method(chunk=size).chunks(6, 0.25)
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    assert {(chunk.generation, chunk.sigma) for chunk in chunks} == {(6, 0.25)}
    assert {chunk.sampling for chunk in chunks} == {Sampling(8, stop=("\n",))}
    assert [member for chunk in chunks for member in chunk.members] == population.members(8, mirrored=True)
    assert all(len(chunk.members) == len(chunk.problems) <= size for chunk in chunks)
    pairs = [set(chunk.pairs) for chunk in chunks]
    assert all(not one & other for one, other in itertools.combinations(pairs, 2))


def test_a_mirrored_pair_cannot_be_cut() -> None:
    """Its noise would be counted in both chunks."""
    with pytest.raises(AssertionError, match="one chunk"):
        method(chunk=3)
    assert method(chunk=3, mirrored=False).chunks(0, 0.1)


@pytest.mark.parametrize(
    ("optimizer", "shaping"),
    [
        (SgdConfig(lr=8.0), "centered_rank"),
        (SgdConfig(lr=1.0, momentum=0.8), "zscore"),
        (AdamConfig(lr=0.15), "per_prompt"),
        (AdamConfig(lr=0.15), "centered_rank"),
    ],
)
def test_es_climbs_a_quadratic(optimizer: OptimizerConfig, shaping: str) -> None:
    dim, generations = 10, 50
    goal, steepness = noise.draw(3, 3, 3, dim), np.linspace(0.5, 2, dim)

    def reward(theta: Vector, _problem: Any, _sample: int) -> float:
        return float(-(steepness * (theta - goal) ** 2).sum())

    es, runner = method(population=24, shaping=shaping, chunk=8), FunctionRunner(reward, dim)
    theta = np.zeros(dim, dtype=np.float32)
    stepper = build_optimizer(optimizer, theta)
    for generation in range(generations):
        direction = estimate(es, runner, theta, generation, sigma=0.1).direction
        assert direction is not None
        theta = stepper.step(theta, direction, optimizer.lr * (1 - generation / generations))
    assert np.linalg.norm(theta - goal) < 0.1 * np.linalg.norm(goal)


def test_each_worker_is_told_which_chunk_it_will_probably_be_given_next() -> None:
    runner = FunctionRunner(lambda theta, problem, sample: float(theta[0]), dim=5, workers=2)
    es = method(population=12, chunk=4)
    estimate(es, runner, np.zeros(5, np.float32), generation=3, sigma=0.1)
    evaluations = [call for call in runner.calls if call.method == "evaluate"]
    # Three chunks for two workers: the first worker gets the last, and then both begin the next generation.
    chunks = [(chunk.generation, chunk.sigma, chunk.members) for step in (3, 4) for chunk in es.chunks(step, 0.1)]
    assert [call.arguments[-1] for call in evaluations] == chunks[2:5]


# --- without stragglers


class Impatient(FunctionRunner):
    """Gives up the calls of some chunks, where it is allowed to."""

    def __init__(self, late: set[int], reward: Reward, dim: int) -> None:
        super().__init__(reward, dim)
        self.late = late

    def run_until(self, calls: Sequence[Call], enough: Callable[[Collection[int]], bool]) -> list[Any]:
        done = [number for number in range(len(calls)) if number not in self.late]
        assert enough(done)
        assert not enough(done[:-1])
        results = dict(zip(done, self.run([calls[number] for number in done]), strict=True))
        return [results.get(number) for number in range(len(calls))]


def test_a_generation_without_its_stragglers_is_that_of_the_other_pairs_and_is_replayed() -> None:
    """Chunk 1 of three pairs is late: what is left is the mean over the two others."""
    dim = 300
    gradient = np.random.default_rng(0).standard_normal(dim)
    es = method(population=6, chunk=2, shaping="per_prompt", prompts=2, min_pairs=2)
    runner = Impatient({1}, linear(gradient), dim)
    found = estimate(es, runner, np.zeros(dim, dtype=np.float32), generation=7, sigma=0.1)
    eps = eps_of(7, 3, dim)[[0, 2]]
    expected = 0.1**2 * ((eps @ gradient)[:, None] * eps).mean(axis=0)
    assert found.direction is not None
    np.testing.assert_allclose(found.direction, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    assert found.record["absent"] == [1]
    assert [row[0] is None for row in found.record["rewards"]] == [False, False, True, True, False, False]
    assert found.record["rollouts"] == 8
    record = json.loads(json.dumps({**found.record, "step": 7}))
    replayed = es.replay(record, Perturber(SEED, dim, 1).noise_sum)
    assert replayed is not None
    assert replayed.tobytes() == found.direction.tobytes()
    assert sum(call.method == "noise_sum" for call in runner.calls) == 2
