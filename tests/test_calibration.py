"""`sigma: auto`: which sigma is chosen, and what the probes look like."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from in_process import FunctionRunner, problems

from es_engine.config import EsMethodConfig
from es_engine.methods.calibration import PROBES, Probe, calibrate, choose
from es_engine.methods.es import EvolutionStrategies
from workers.engine import CENTER, Member, Sampling, Vector

DIM = 400
MEMBERS = 8  # as many as the default probes have


def probes(figures: Sequence[tuple[float, float, float]]) -> list[Probe]:
    return [Probe(sigma, mean, spread, MEMBERS) for sigma, mean, spread in figures]


@pytest.mark.parametrize("center", [0.27, 0.275, 0.28])
def test_the_figures_measured_on_smollm2_give_003(center: float) -> None:
    """A run with this sigma is known to learn. The spread at 0.2 was not measured; the mean is gone there."""
    measured = [(0.01, 0.281, 0.003), (0.03, 0.264, 0.026), (0.1, 0.112, 0.074), (0.2, 0.020, 0.03)]
    assert choose(probes(measured), center) == 0.03


@pytest.mark.parametrize(("mean_at_half", "chosen"), [(0.39, 0.5), (0.38, 0.5), (0.36, 0.3)])
def test_the_figures_measured_on_the_tiny_model_give_03_or_05(mean_at_half: float, chosen: float) -> None:
    """Spreads and the mean at 0.8 were measured; the mean at 0.5 was not, and decides between the two."""
    measured = [
        (0.03, 0.396, 0.0),
        (0.1, 0.396, 0.014),
        (0.3, 0.39, 0.025),
        (0.5, mean_at_half, 0.032),
        (0.8, 0.317, 0.039),
    ]
    assert choose(probes(measured), 0.396) == chosen


def test_a_mean_within_two_standard_errors_is_not_lowered() -> None:
    spread = 0.08
    limit = 0.5 - 2 * spread / np.sqrt(MEMBERS)
    small = (0.1, 0.5, 0.01)
    assert choose(probes([small, (0.3, limit + 1e-9, spread)]), 0.5) == 0.3
    assert choose(probes([small, (0.3, limit - 1e-9, spread)]), 0.5) == 0.1


def test_a_mean_that_rises_is_welcome_and_order_does_not_matter() -> None:
    figures = [(0.1, 0.2, 0.01), (0.3, 0.9, 0.05), (1.0, -0.5, 0.2)]
    for turn in range(3):
        assert choose(probes(figures[turn:] + figures[:turn]), 0.2) == 0.3


@pytest.mark.parametrize(
    ("figures", "center"),
    [
        ([(0.1, 0.5, 0.0), (0.3, 0.5, 0.0)], 0.5),
        ([(0.1, 0.1, 0.01), (0.3, 0.0, 0.01)], 0.5),
        ([(0.1, float("nan"), float("nan")), (0.3, float("nan"), 0.0)], float("nan")),
    ],
)
def test_without_a_useful_spread_there_is_no_sigma(figures: list[tuple[float, float, float]], center: float) -> None:
    with pytest.raises(
        ValueError, match=r"^method\.sigma: auto found no sigma among 0\.1, 0\.3 that changes"
    ) as caught:
        choose(probes(figures), center)
    assert "\n" not in str(caught.value)


def fragile(theta: Vector, problem: Any, _sample: int) -> float:
    """Rewards in steps of 1/4, at 2 near zero, that rise along one direction and fall away from it.

    With theta = sigma * eps: no change at 0.01, spread at 0.1, and at 1 the fall has outweighed everything.
    """
    along = float(theta.sum()) / 8  # 2.5 sigma, standard deviation
    away = float(np.square(theta).sum()) / 50  # 8 sigma^2
    return round(4 * (2 + along - away + len(problem.prompt_ids) / 64)) / 4


def auto(**changes: Any) -> EvolutionStrategies:
    config = EsMethodConfig(**{"population": 32, "prompts": 2, "probe_sigmas": (0.01, 0.1, 1.0), **changes})
    return EvolutionStrategies(config, chunk=4, sampling=Sampling(8))


def run(es: EvolutionStrategies, runner: FunctionRunner) -> dict[str, Any]:
    return calibrate(es, runner, np.zeros(DIM, dtype=np.float32), 0, problems(es.config.prompts))


@pytest.mark.parametrize(
    "changes",
    [{}, {"sharing": "pair"}, {"sharing": "member"}, {"mirrored": False}, {"shaping": "per_prompt"}],
)
def test_probing_finds_the_sigma_that_spreads_without_harm(changes: dict[str, Any]) -> None:
    runner = FunctionRunner(fragile, DIM, workers=3)
    found = run(auto(**changes), runner)
    assert found["sigma"] == 0.1
    assert found["center_mean"] == 2.0
    assert [probe["sigma"] for probe in found["probes"]] == [0.01, 0.1, 1.0]
    assert found["probes"][0]["spread"] == 0.0
    assert found["probes"][1]["spread"] < found["probes"][2]["spread"]
    assert found["probes"][2]["mean"] < 0
    assert found["tokens"] == 3 * 2 * (1 + 3 * 8)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_probes_are_populations_of_their_own() -> None:
    """8 members at each sigma and the center alone, all of one generation, which the run will not have: what is drawn
    in it, directions and sampled answers, is the same for all."""
    runner = FunctionRunner(fragile, DIM)
    run(auto(), runner)
    *chunks, center = (call.arguments[0] for call in runner.calls)  # the smallest chunk is begun last
    assert center.members == (CENTER,)
    assert center.problems == ((0, 1),)
    assert center.sigma == 0
    by_sigma: dict[float, list[Member]] = {}
    for chunk in chunks:
        assert chunk.problems == ((0, 1),) * 4
        by_sigma.setdefault(chunk.sigma, []).extend(chunk.members)
    assert {sigma: len(set(members)) for sigma, members in by_sigma.items()} == {0.01: 8, 0.1: 8, 1.0: 8}
    assert {chunk.generation for chunk in [*chunks, center]} == {PROBES}
    assert PROBES >= 2**32


@pytest.mark.parametrize("value", [0.0, 0.1, 0.7])
def test_a_reward_that_never_changes_is_an_error(value: float) -> None:
    """In floating point the standard deviation of six times 0.1 is not 0."""
    assert np.std([0.1] * 6) > 0
    with pytest.raises(ValueError, match=r"method\.sigma: auto found no sigma"):
        run(auto(probe_pairs=3), FunctionRunner(lambda *_: value, DIM))


def test_a_sigma_at_which_answers_cannot_be_scored_is_too_large() -> None:
    """Of those that can, the mean is as high as the center's, and the spread the largest of all."""

    def reward(theta: Vector, problem: Any, sample: int) -> float:
        if np.abs(theta).max() < 1.5:  # as all are at 0.1, and none at 1
            return fragile(theta, problem, sample)
        return 2 + float(theta[0]) if problem.example.id == "p0" else float("nan")

    found = run(auto(prompts=4), FunctionRunner(reward, DIM))
    assert found["sigma"] == 0.1
    assert found["probes"][2]["spread"] > found["probes"][1]["spread"]


def test_a_sigma_at_which_nothing_can_be_scored_is_recorded() -> None:
    def reward(theta: Vector, problem: Any, sample: int) -> float:
        return fragile(theta, problem, sample) if np.abs(theta).max() < 1.5 else float("nan")

    found = run(auto(), FunctionRunner(reward, DIM))
    assert (found["sigma"], found["probes"][2]["spread"]) == (0.1, 0.0)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_verifier_that_never_scores_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"method\.sigma: auto found no sigma"):
        run(auto(), FunctionRunner(lambda *_: float("nan"), DIM))
