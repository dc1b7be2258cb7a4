"""Rollouts by the pool, and what they come to.

Shapes: k members of a chunk, P problems, n samples a problem.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from es_engine.costs import Costs
from es_engine.methods import shaping
from es_engine.methods.base import CallRunner
from rewards.base import NO_SCORE
from workers.calls import Call
from workers.chunks import Chunk, ChunkResult, Problem, absent, by_verifier, fault_of

Array = npt.NDArray[np.float64]

MOST_FAILURES = 0.5
"""The part of the rollouts of a generation, or of an evaluation, on which the verifier may fail."""


def evaluate(
    pool: CallRunner,
    chunks: Sequence[Chunk],
    batch: Sequence[Problem],
    theta: Any,
    version: int,
    upcoming: Sequence[Chunk] = (),
    min_pairs: int | None = None,
) -> list[ChunkResult]:
    """Have chunks evaluated around theta; the results in the order of the chunks. Raises ValueError where the verifier
    failed on most rollouts: what the others are worth says nothing then.

    The largest chunks are begun first, so that none of them is still at work when all others are done. `upcoming` will
    be evaluated after them. A worker is told which chunk it will probably be given next, the one as many places on as
    there are workers, so that it can get ready for it while it generates. With `min_pairs`, chunks that are late once
    so many pairs are there are given up; their results are absent.
    """
    order = sorted(range(len(chunks)), key=lambda place: -work(chunks[place], batch))
    begun = [chunks[place] for place in order]
    following = [*begun, *upcoming][pool.size :]
    notes = [(chunk.generation, chunk.sigma, chunk.members) for chunk in following] + [None] * pool.size
    shared = pool.put(list(batch))
    calls = [
        Call(
            str(chunk),
            "evaluate",
            (chunk, shared, theta, version, ahead),
            chunk=chunk.index,
            fault=partial(fault_of, chunk, batch),
        )
        for chunk, ahead in zip(begun, notes, strict=False)
    ]

    def enough(done: Collection[int]) -> bool:
        return sum(len(begun[number].pairs) for number in done) >= (min_pairs or math.inf)

    replies = pool.run(calls) if min_pairs is None else pool.run_until(calls, enough)
    results = [absent(chunk) if reply is None else reply for chunk, reply in zip(begun, replies, strict=True)]
    _check_scored(results)
    by_place = dict(zip(order, results, strict=True))
    return [by_place[place] for place in range(len(chunks))]


def _check_scored(results: Sequence[ChunkResult]) -> None:
    failures = Counter({failure: count for failure, count in _failures(results).items() if failure[1] != NO_SCORE})
    rollouts = sum(result.rewards.size for result in results)
    if failures.total() > MOST_FAILURES * rollouts:
        kinds = ", ".join(f"{verifier}: {kind} {count}" for (verifier, kind), count in failures.most_common())
        error = next((result.error for result in results if result.error is not None), "none was given")
        raise ValueError(
            f"task: {failures.total()} of {rollouts} rollouts could not be scored ({kinds}); one error: {error}"
        )


def work(chunk: Chunk, batch: Sequence[Problem]) -> int:
    """The most tokens a chunk can take: those of its prompts, and of references or answers as long as they may be."""
    answer = chunk.sampling.samples * chunk.sampling.max_tokens
    lengths = [
        len(problem.prompt_ids) + (answer if problem.reference is None else len(problem.reference)) for problem in batch
    ]
    return sum(lengths[place] for places in chunk.problems for place in places)


def figures(results: Sequence[ChunkResult]) -> dict[str, Any]:
    """What a step's record says of its rollouts, whatever they were for; also where there are none."""
    results = [result for result in results if not result.absent]
    return {
        "accuracy": mean(np.concatenate([np.zeros(0), *(result.accuracy.ravel() for result in results)])),
        "components": mean_components(results),
        "rollouts": sum(result.rewards.size for result in results),
        "tokens": int(sum(result.tokens.sum() for result in results)),
        "prompt_tokens": sum(result.prompt_tokens for result in results),
        "truncated": sum(result.truncated for result in results),
        "looped": sum(result.looped for result in results),
        "unscored": int(sum(np.isnan(result.rewards).sum() for result in results)),
        "failures": failures_by_verifier(results),
        "rescored": sum(result.rescored for result in results),
        "times": _phase_times(results),
    }


def total_costs(results: Sequence[ChunkResult]) -> Costs:
    """What the chunks cost together."""
    return sum((result.costs for result in results), Costs())


def _phase_times(results: Sequence[ChunkResult]) -> dict[str, float]:
    """Seconds of work in each phase, summed over chunks."""
    phases = results[0].seconds if results else ()
    return {phase: sum(result.seconds[phase] for result in results) for phase in phases}


def mean_of_samples(values: Array) -> Array:
    """Means (k, P) over the scored samples of values (k, P, n); NaN where none is scored."""
    return shaping.fitness(values.reshape(-1, values.shape[-1])).reshape(values.shape[:-1])


def failures_by_verifier(results: Sequence[ChunkResult]) -> dict[str, dict[str, int]]:
    """Scores that a verifier, or a part of a sum, did not give, by its name, then by kind. A rollout of which only part
    has none has a score all the same."""
    return by_verifier(_failures(results))


def _failures(results: Sequence[ChunkResult]) -> Counter[tuple[str, str]]:
    failures: Counter[tuple[str, str]] = Counter()
    for result in results:
        failures.update(result.failures)
    return failures


def mean_components(results: Sequence[ChunkResult]) -> dict[str, float | None]:
    """The mean of each named reward component over all rollouts that have it."""
    names = sorted({name for result in results for name in result.components})
    return {
        name: mean(np.concatenate([result.components[name].ravel() for result in results if name in result.components]))
        for name in names
    }


def constant_rows(rewards: Array) -> int:
    """How many rows of rewards hold no two that differ by more than rounding, those that are NaN left out."""
    rewards = shaping.without_rounding_errors(rewards, rewards)
    highest, lowest = np.nanmax(rewards, axis=1, initial=-np.inf), np.nanmin(rewards, axis=1, initial=np.inf)
    return int((highest <= lowest).sum())


def mean(values: Array) -> float | None:
    """The mean of the numbers that are there; None where none is."""
    present = values[~np.isnan(values)]
    return float(present.mean()) if len(present) else None
