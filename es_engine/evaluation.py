"""How good the center is: held-out problems, greedy or sampled, with intervals and pass@k.

Shapes: P problems, n samples a problem.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from es_engine.methods.base import CallRunner
from es_engine.methods.rollouts import (
    evaluate,
    failures_by_verifier,
    mean_components,
    mean_of_samples,
    total_costs,
)
from workers.chunks import EVALUATION, Chunk, ChunkResult, Problem, Transcript
from workers.engine import CENTER, Sampling

Array = npt.NDArray[np.float64]

Z95 = 1.959964


@dataclass(frozen=True, slots=True)
class Evaluation:
    """`summary` is plain data for eval.jsonl; `samples` are the completions with their scores, one row each."""

    summary: dict[str, Any]
    samples: list[dict[str, Any]]


def evaluate_center(
    pool: CallRunner, theta: Any, version: int, problems: Sequence[Problem], sampling: Sampling, chunk: int
) -> Evaluation:
    """Evaluate theta itself on problems, `chunk` of them in one engine call. One that comes more than once is asked
    once: its answers again would be no further evidence, and intervals too narrow."""
    problems = list({each.example.problem: each for each in problems}.values())
    results = evaluate(pool, _chunks(len(problems), sampling, chunk), problems, theta, version)
    rewards = np.concatenate([result.rewards[0] for result in results])
    accuracy = np.concatenate([result.accuracy[0] for result in results])
    return Evaluation(_summary(results, rewards, accuracy), _samples(results, problems))


def pass_at_k(correct: npt.NDArray[np.int64], samples: int, k: int) -> float:
    """Mean probability that k of n samples hold a right one, unbiased (Chen et al., arXiv 2107.03374): 1 -
    C(n-c,k)/C(n,k)."""
    assert k <= samples
    return float(np.mean([1 - math.comb(samples - int(c), k) / math.comb(samples, k) for c in correct]))


def wilson_interval(successes: float, count: int) -> tuple[float, float]:
    """The 95% Wilson score interval of a proportion."""
    p = successes / count
    middle = (p + Z95**2 / (2 * count)) / (1 + Z95**2 / count)
    half = Z95 / (1 + Z95**2 / count) * math.sqrt(p * (1 - p) / count + Z95**2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def is_best(line: Mapping[str, Any], before: Sequence[Mapping[str, Any]]) -> bool:
    """Whether an evaluation has the highest reward so far. A problem without a score has the lowest reward that any
    had: were it left out, a center that gives few answers which can be scored might seem the best."""
    if line["reward"] is None:
        return False
    scored = [other for other in before if other["reward"] is not None]
    lowest = min(each.get("reward_lowest", each["reward"]) for each in [line, *scored])

    def reward(each: Mapping[str, Any]) -> float:
        unscored = each.get("unscored", 0.0)
        return (1 - unscored) * each["reward"] + unscored * lowest

    return all(reward(line) > reward(other) for other in scored)


def _chunks(problems: int, sampling: Sampling, size: int) -> list[Chunk]:
    return [
        Chunk(
            EVALUATION,
            index,
            0.0,
            (CENTER,),
            (tuple(range(start, min(start + size, problems))),),
            sampling,
            keep_text=True,
        )
        for index, start in enumerate(range(0, problems, size))
    ]


def _summary(results: Sequence[ChunkResult], rewards: Array, accuracy: Array) -> dict[str, Any]:
    per_problem = mean_of_samples(rewards[None])[0]
    scored = per_problem[~np.isnan(per_problem)]
    summary: dict[str, Any] = {
        "problems": len(rewards),
        "samples": rewards.shape[1],
        "reward": float(scored.mean()) if len(scored) else None,
        "reward_ci95": _normal_interval(scored),
        "reward_lowest": float(scored.min()) if len(scored) else 0.0,
        "unscored": float(np.isnan(per_problem).mean()),
        "components": mean_components(results),
        "tokens": int(sum(result.tokens.sum() for result in results)),
        "prompt_tokens": sum(result.prompt_tokens for result in results),
        "truncated": sum(result.truncated for result in results),
        "looped": sum(result.looped for result in results),
        "failures": failures_by_verifier(results),
        "rescored": sum(result.rescored for result in results),
        "costs": total_costs(results).to_json(),
        "times": {phase: sum(result.seconds[phase] for result in results) for phase in results[0].seconds},
    }
    return summary | _accuracy_summary(accuracy)


def _accuracy_summary(accuracy: Array) -> dict[str, Any]:
    """Mean accuracy with its interval, and pass@k for powers of two up to n; nothing where the verifier gives none."""
    if np.isnan(accuracy).all():
        return {"accuracy": None, "accuracy_ci95": None, "pass_at_k": {}}
    filled = np.nan_to_num(accuracy)  # a rollout without a verdict solved nothing
    samples = filled.shape[1]
    correct = (filled >= 1).sum(axis=1)
    powers = [2**power for power in range(samples.bit_length())]
    interval = (
        wilson_interval(float(filled.sum()), len(filled)) if samples == 1 else _normal_interval(filled.mean(axis=1))
    )
    return {
        "accuracy": float(filled.mean()),
        "accuracy_ci95": interval and list(interval),
        "pass_at_k": {str(k): pass_at_k(correct, samples, k) for k in powers},
    }


def _normal_interval(values: Array) -> list[float] | None:
    if len(values) < 2:
        return None
    half = Z95 * float(values.std(ddof=1)) / math.sqrt(len(values))
    return [float(values.mean()) - half, float(values.mean()) + half]


def _samples(results: Sequence[ChunkResult], problems: Sequence[Problem]) -> list[dict[str, Any]]:
    rows = []
    numbered = iter(problems)
    for result in results:
        assert result.transcripts is not None
        for place, transcripts in enumerate(result.transcripts[0]):
            problem = next(numbered)
            rows += [_sample(result, problem, place, sample, each) for sample, each in enumerate(transcripts)]
    return rows


def _sample(result: ChunkResult, problem: Problem, place: int, sample: int, transcript: Transcript) -> dict[str, Any]:
    where = (0, place, sample)
    row: dict[str, Any] = {
        "id": problem.example.id,
        "prompt": problem.prompt,
        "completion": transcript.text,
        "answer": problem.example.answer,
        "reward": _number(result.rewards[where]),
        "accuracy": _number(result.accuracy[where]),
        "components": {name: _number(values[where]) for name, values in result.components.items()},
        "tokens": int(result.tokens[where]),
    }
    if transcript.notes:
        row["notes"] = transcript.notes
    if transcript.messages is not None:
        row["messages"] = list(transcript.messages)
    return row


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
