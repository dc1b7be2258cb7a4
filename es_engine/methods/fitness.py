"""What ES compares members by: the task's rewards, closeness to a teacher, or the likelihood of given completions.

*reward* is the verifier's. *teacher* is minus the reverse KL divergence KL(member || teacher), on-policy distillation
without gradients: members complete prompts at temperature 1, and a second round of calls asks the teacher about all
completions of a generation. *references* is the log-likelihood of demonstrations, supervised fine-tuning without
gradients: members read them and generate nothing.

A completion counts with the sum over its tokens, divided by the mean length of all completions of the generation: one
number for all members, so that fitness is in nats a token. Divided by its own length, a completion that the teacher
finds unlikely would count less for being longer, and the teacher itself would no longer be the best of members: the
divergence of sequences is that of the sums.

Shapes: N members, P problems, n samples a problem, k members of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from es_engine.costs import Costs, costs_of
from es_engine.methods import gradients, shaping
from es_engine.methods.base import CallRunner, Problems
from es_engine.methods.rollouts import constant_rows, evaluate, figures, mean, mean_of_samples, total_costs
from es_engine.methods.sft import Demonstrations
from workers.chunks import Chunk, ChunkResult, Problem
from workers.completions import Completions
from workers.engine import Completion
from workers.samples import Sample, suitable_tokens

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Measured:
    """Members' fitness on each of their problems, (N, P), NaN where there is none, in the order of the chunks; what
    came of each chunk; what the ledger keeps of it, as plain JSON data; and what it cost."""

    fitness: Array
    results: list[ChunkResult]
    record: dict[str, Any]
    costs: Costs


class Fitness(Protocol):
    """What the members of a generation are given, and how they do."""

    def batch(self, numbers: Sequence[int], problems: Problems) -> list[Problem]:
        """The problems of these numbers, from 0 without end; `problems` are the task's."""
        ...

    def measure(
        self,
        pool: CallRunner,
        chunks: Sequence[Chunk],
        batch: Sequence[Problem],
        theta: Any,
        version: int,
        upcoming: Sequence[Chunk] = (),
        min_pairs: int | None = None,
    ) -> Measured:
        """The fitness of the members of chunks around theta; arguments and errors are those of `rollouts.evaluate`."""
        ...


class RewardFitness:
    """The verifier's rewards."""

    def batch(self, numbers: Sequence[int], problems: Problems) -> list[Problem]:
        """The task's training problems."""
        return problems("train", numbers)

    def measure(
        self,
        pool: CallRunner,
        chunks: Sequence[Chunk],
        batch: Sequence[Problem],
        theta: Any,
        version: int,
        upcoming: Sequence[Chunk] = (),
        min_pairs: int | None = None,
    ) -> Measured:
        """One round of calls."""
        results = evaluate(pool, chunks, batch, theta, version, upcoming, min_pairs)
        rewards = _rewards(results)
        return Measured(rewards, results, _reward_record(rewards) | figures(results), total_costs(results))


@dataclass(frozen=True, slots=True)
class TeacherFitness:
    """Minus the reverse KL divergence from a teacher with so many `parameters` that multiply. A token that the teacher
    lacks does not count."""

    parameters: int

    def batch(self, numbers: Sequence[int], problems: Problems) -> list[Problem]:
        """The task's training problems."""
        return problems("train", numbers)

    def measure(
        self,
        pool: CallRunner,
        chunks: Sequence[Chunk],
        batch: Sequence[Problem],
        theta: Any,
        version: int,
        upcoming: Sequence[Chunk] = (),
        min_pairs: int | None = None,
    ) -> Measured:
        """A round of calls for the completions and their rewards, and one for the teacher."""
        assert min_pairs is None
        told = [replace(each, sampling=replace(each.sampling, logprobs=True), keep_text=True) for each in chunks]
        results = evaluate(pool, told, batch, theta, version, upcoming)
        rewards = _rewards(results)
        ratios, costs = self._log_ratios(pool, chunks, batch, results)
        sums = np.array([ratio.sum() for ratio in ratios])
        there = ~np.isnan(sums)  # a member whose own probabilities are no numbers has no fitness
        tokens = sum(len(ratio) for ratio, counts in zip(ratios, there, strict=True) if counts)
        fitness = mean_of_samples(-sums.reshape(*rewards.shape, -1)) * there.sum() / max(1, tokens)
        learning = {"reverse_kl": float(sums[there].sum()) / tokens if tokens else None}
        record = _reward_record(rewards) | figures(results) | {"fitness": _rows(fitness), "learning": learning}
        record["times"]["teacher"] = costs.worker_seconds
        return Measured(fitness, results, record, total_costs(results) + costs)

    def _log_ratios(
        self, pool: CallRunner, chunks: Sequence[Chunk], batch: Sequence[Problem], results: Sequence[ChunkResult]
    ) -> tuple[list[Array], Costs]:
        """log p - log q of each completion's tokens that the teacher knows, member by member and problem by problem,
        and what the teacher cost."""
        said = [
            (batch[place].prompt_ids, completion)
            for chunk, result in zip(chunks, results, strict=True)
            for (_, place), completions in zip(chunk.questions, _completions(result), strict=True)
            for completion in completions
        ]
        samples = [Sample(prompt, completion.token_ids) for prompt, completion in said]
        teacher = gradients.teacher_logprobs(pool, samples, max_tokens=suitable_tokens(samples))
        ratios = [
            (np.array(completion.logprobs) - row)[np.isfinite(row)]
            for (_, completion), row in zip(said, teacher.rows, strict=True)
        ]
        return ratios, costs_of(self.parameters, teacher.tokens, seconds=teacher.seconds)


@dataclass(frozen=True, slots=True)
class ReferenceFitness:
    """The log-likelihood of demonstrations' completions."""

    demonstrations: Demonstrations
    completions: Completions

    def batch(self, numbers: Sequence[int], problems: Problems) -> list[Problem]:
        """Demonstrations, as problems with a reference. Raises ValueError for one that is too long for the model."""
        return [
            replace(problem, reference=() if said is None else self.completions.sample(problem, said).completion_ids)
            for problem, said in self.demonstrations(numbers, problems)
        ]

    def measure(
        self,
        pool: CallRunner,
        chunks: Sequence[Chunk],
        batch: Sequence[Problem],
        theta: Any,
        version: int,
        upcoming: Sequence[Chunk] = (),
        min_pairs: int | None = None,
    ) -> Measured:
        """One round of calls, in which members read. Where all read the whole batch, a member's mean is minus the loss
        that SFT has on it."""
        results = evaluate(pool, chunks, batch, theta, version, upcoming, min_pairs)
        lengths = [len(problem.reference) for problem in batch if problem.reference]
        fitness = _rewards(results) / np.mean(lengths) if lengths else _rewards(results)
        likelihood = mean(fitness.ravel())
        learning = {"nll": None if likelihood is None else -likelihood}
        record = {"reward_mean": None, "fitness": _rows(fitness), "learning": learning, "rollouts": 0, "unscored": 0}
        return Measured(fitness, results, figures(results) | record, total_costs(results))


def _rewards(results: Sequence[ChunkResult]) -> Array:
    return np.concatenate([mean_of_samples(result.rewards) for result in results])


def _completions(result: ChunkResult) -> list[list[Completion]]:
    """Those of each of a chunk's questions."""
    assert result.transcripts is not None
    return [
        [each.completion for each in samples if each.completion is not None]
        for member in result.transcripts
        for samples in member
    ]


def _rows(values: Array) -> list[list[float | None]]:
    return [[None if np.isnan(value) else value for value in row] for row in values.tolist()]


def _reward_record(rewards: Array) -> dict[str, Any]:
    values = shaping.fitness(rewards)
    return {
        "rewards": _rows(rewards),
        "reward_mean": mean(values),
        "reward_best": float(np.nanmax(values)) if not np.isnan(values).all() else None,
        "constant_members": constant_rows(rewards),
    }
