"""How good the center is: means, intervals and pass@k."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from in_process import FunctionRunner, problems
from scipy import stats

from es_engine import noise
from es_engine.cli import _name_of
from es_engine.evaluation import Evaluation, evaluate_center, is_best, pass_at_k, wilson_interval
from workers.chunks import EVALUATION, KL_DIVERGENCE, Chunk
from workers.engine import CENTER, Sampling, Vector

NAN = float("nan")


@pytest.mark.parametrize("samples", [1, 2, 5, 6])
def test_pass_at_k_counts_the_subsets_with_a_right_answer(samples: int) -> None:
    for k in range(1, samples + 1):
        for correct in range(samples + 1):
            answers = [True] * correct + [False] * (samples - correct)
            subsets = list(itertools.combinations(answers, k))
            expected = sum(any(subset) for subset in subsets) / len(subsets)
            assert pass_at_k(np.array([correct]), samples, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_is_a_mean_over_problems() -> None:
    assert pass_at_k(np.array([0, 4, 1]), 4, 2) == pytest.approx((0 + 1 + 0.5) / 3)
    assert pass_at_k(np.array([1]), 10_000, 5_000) == pytest.approx(0.5)


@given(data=st.data(), count=st.integers(1, 2000))
def test_wilson_interval_is_scipys(data: st.DataObject, count: int) -> None:
    successes = data.draw(st.integers(0, count))
    low, high = wilson_interval(successes, count)
    expected = stats.binomtest(successes, count).proportion_ci(0.95, method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-7)
    assert 0 <= low < high <= 1


def rewarded(table: list[list[float]]) -> FunctionRunner:
    """A runner that gives problem i, sample j the reward table[i][j]; at least 1 is a right answer."""
    return FunctionRunner(lambda _theta, problem, sample: table[len(problem.prompt_ids) - 1][sample], 3, workers=2)


def evaluate(table: list[list[float]], chunk: int = 2) -> Evaluation:
    samples = len(table[0])
    sampling = Sampling(8, samples, temperature=0.0 if samples == 1 else 1.0)
    return evaluate_center(rewarded(table), np.zeros(3, np.float32), 0, problems(len(table)), sampling, chunk)


def test_a_greedy_evaluation() -> None:
    summary = evaluate([[1.0], [0.0], [0.1], [1.0], [0.4]]).summary
    values = np.array([1.0, 0.0, 0.1, 1.0, 0.4])
    assert summary["problems"] == 5
    assert summary["samples"] == 1
    assert summary["reward"] == pytest.approx(0.5)
    half = 1.959964 * values.std(ddof=1) / math.sqrt(5)
    assert summary["reward_ci95"] == pytest.approx([0.5 - half, 0.5 + half])
    assert summary["accuracy"] == pytest.approx(0.4)
    assert summary["accuracy_ci95"] == pytest.approx(list(wilson_interval(2, 5)))
    assert summary["pass_at_k"] == {"1": pytest.approx(0.4)}
    assert summary["components"] == {"exact": pytest.approx(0.25)}
    assert summary["tokens"] == 15
    assert summary["prompt_tokens"] == 1 + 2 + 3 + 4 + 5
    assert summary["truncated"] == 3  # one in each chunk
    assert summary["looped"] == 6
    assert summary["times"] == {"generate": 1.5}


def test_a_sampled_evaluation() -> None:
    """Problems, not samples, are independent: intervals are of means over problems."""
    table = [[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]
    summary = evaluate(table).summary
    means = np.array([0.5, 0.0, 1.0])
    half = 1.959964 * means.std(ddof=1) / math.sqrt(3)
    assert summary["samples"] == 4
    assert summary["accuracy"] == pytest.approx(0.5)
    assert summary["accuracy_ci95"] == pytest.approx([0.5 - half, 0.5 + half])
    assert summary["pass_at_k"] == pytest.approx({"1": 0.5, "2": (5 / 6 + 1) / 3, "4": 2 / 3})


@pytest.mark.parametrize(
    ("samples", "powers"), [(1, ["1"]), (3, ["1", "2"]), (4, ["1", "2", "4"]), (6, ["1", "2", "4"])]
)
def test_pass_at_k_is_given_for_powers_of_two(samples: int, powers: list[str]) -> None:
    assert list(evaluate([[1.0] * samples, [0.0] * samples]).summary["pass_at_k"]) == powers


def test_rollouts_without_a_score_count_as_wrong_but_not_as_a_reward() -> None:
    """A reward that is missing is left out of the mean; an answer that could not be checked solved nothing."""
    table = [[1.0, NAN], [NAN, NAN], [0.0, 0.5], [1.0, 1.0]]
    evaluation = evaluate(table)
    summary = evaluation.summary
    assert summary["reward"] == pytest.approx((1 + 0.25 + 1) / 3)
    assert summary["accuracy"] == pytest.approx(3 / 8)
    assert summary["pass_at_k"] == pytest.approx({"1": 3 / 8, "2": 2 / 4})
    assert summary["failures"] == {"mine": {"no score": 3}}
    assert [row["reward"] for row in evaluation.samples] == [1, None, None, None, 0, 0.5, 1, 1]
    json.dumps([summary, evaluation.samples], allow_nan=False)


def test_a_problem_that_comes_again_is_asked_once() -> None:
    """As where a file has fewer held-out rows than `evaluation.problems`."""
    few = problems(3)
    runner = rewarded([[1.0], [0.0], [0.0]])
    theta = np.zeros(3, np.float32)
    found = evaluate_center(runner, theta, 0, [few[0], few[1], few[0], few[2], *few], Sampling(8), chunk=2)
    assert found.summary["problems"] == 3
    assert found.summary["accuracy_ci95"] == pytest.approx(list(wilson_interval(1, 3)))
    assert [row["id"] for row in found.samples] == ["p0", "p1", "p2"]
    assert [row["reward"] for row in found.samples] == [1.0, 0.0, 0.0]
    alike = replace(few[1], example=replace(few[1].example, id="p0"))  # numbered alike by whoever made the file
    found = evaluate_center(runner, theta, 0, [few[0], alike, few[0]], Sampling(8), chunk=2)
    assert [row["prompt"] for row in found.samples] == ["prompt 0", "prompt 1"]
    renumbered = replace(few[1], example=replace(few[1].example, id="p9"))
    found = evaluate_center(runner, theta, 0, [few[0], few[1], renumbered], Sampling(8), chunk=2)
    assert [row["prompt"] for row in found.samples] == ["prompt 0", "prompt 1"]
    other_game = replace(few[1], example=replace(few[1].example, hidden="another start"))
    found = evaluate_center(runner, theta, 0, [few[0], few[1], other_game], Sampling(8), chunk=2)
    assert [row["prompt"] for row in found.samples] == ["prompt 0", "prompt 1", "prompt 1"]


def test_the_best_center_is_not_one_that_few_answers_of_which_can_be_scored() -> None:
    few = evaluate([[1.0], [NAN], [NAN], [NAN]]).summary
    half = evaluate([[1.0], [0.8], [0.0], [-0.2]]).summary
    most = evaluate([[1.0], [0.8], [0.0], [0.0]]).summary
    none = evaluate([[NAN], [NAN], [NAN], [NAN]]).summary
    assert (few["reward"], few["unscored"], few["reward_lowest"]) == (1.0, 0.75, 1.0)
    assert is_best(few, [])
    assert not is_best(none, [])
    assert is_best(half, [none, few])
    assert not is_best(few, [half])
    assert is_best(most, [few, half])
    assert not is_best(most, [few, half, most])


def test_nothing_scored_at_all() -> None:
    summary = evaluate([[NAN], [NAN]]).summary
    assert summary["reward"] is None
    assert summary["reward_ci95"] is None
    assert summary["accuracy"] is None
    assert summary["accuracy_ci95"] is None
    assert summary["pass_at_k"] == {}
    assert summary["components"] == {"exact": None}
    json.dumps(summary, allow_nan=False)


def test_one_problem_has_no_interval_of_the_reward() -> None:
    summary = evaluate([[0.5]]).summary
    assert summary["reward_ci95"] is None
    assert summary["accuracy_ci95"] == pytest.approx(list(wilson_interval(0, 1)))
    json.dumps(evaluate([[0.0, 1.0]]).summary, allow_nan=False)


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_every_completion_is_kept_with_its_own_problem(chunk: int) -> None:
    table = [[i + j / 10 for j in range(2)] for i in range(5)]
    evaluation = evaluate(table, chunk)
    rows = [(row["id"], row["completion"], row["answer"], row["reward"]) for row in evaluation.samples]
    assert rows == [(f"p{i}", f"p{i}/{j}", str(i), table[i][j]) for i in range(5) for j in range(2)]
    first = evaluation.samples[0]
    assert first.keys() == {"id", "prompt", "completion", "answer", "reward", "accuracy", "components", "tokens"}
    assert (first["prompt"], first["tokens"], first["accuracy"]) == ("prompt 0", 3, 0.0)
    assert evaluation.samples[-1]["components"] == {"exact": pytest.approx(4.1 / 2)}


def test_the_center_itself_is_evaluated() -> None:
    center = noise.draw(1, 1, 1, 3)
    seen: list[bytes] = []

    def reward(theta: Vector, _problem: Any, _sample: int) -> float:
        seen.append(theta.tobytes())
        return 0.0

    runner = FunctionRunner(reward, 3)
    evaluate_center(runner, center, 0, problems(3), Sampling(8), chunk=2)
    assert seen == [center.tobytes()] * 3
    assert all(call.arguments[0].members == (CENTER,) for call in runner.calls)


def test_evaluations_at_different_steps_sample_alike() -> None:
    """Sampling is keyed by the chunk's generation and the problem."""
    generations = set()
    for version in (0, 10, 20):
        runner = rewarded([[0.0], [1.0]])
        evaluate_center(runner, np.zeros(3, np.float32), version, problems(2), Sampling(8), chunk=1)
        generations |= {call.arguments[0].generation for call in runner.calls}
    assert len(generations) == 1


def test_evaluations_of_two_runs_have_names_of_their_own(tmp_path: Path) -> None:
    for run in ("one", "two"):
        for folder in ("adapter", "best"):
            (tmp_path / run / folder).mkdir(parents=True)
        (tmp_path / run / "config.yaml").touch()
    (tmp_path / "alone").mkdir()
    asked = ("one", "two", "one/best", "two/best", "alone", "one/config.yaml")
    names = ["one", "two", "one-best", "two-best", "alone", "config"]
    assert [_name_of(tmp_path / each) for each in asked] == names


@pytest.mark.parametrize(
    ("generation", "name"),
    [(7, "generation 7"), (EVALUATION, "an evaluation"), (KL_DIVERGENCE, "the measurement of KL")],
)
def test_a_chunk_is_called_by_what_it_is_for(generation: int, name: str) -> None:
    assert str(Chunk(generation, 2, 0.0, (CENTER,), ((0,),), Sampling(8, 1, 0.0))) == f"chunk 2 of {name}"
