"""Supervised fine-tuning, on the pool: the cross-entropy of completions that are given, prompts masked.

A step goes over a batch of demonstrations once: rows of a file or data set, in an order of its own for each epoch, or
worked solutions of the task's training problems. They share micro-batches by length. Nothing is generated.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from es_engine import losses
from es_engine.config.method import SftMethodConfig
from es_engine.methods.base import CallRunner, Directions, Problems, Report
from es_engine.methods.gradients import Gradient
from es_engine.methods.rollouts import figures
from es_engine.methods.updates import GRADIENT_SLOTS, Updates
from rewards.base import SingleTurnTask
from rewards.demonstrations import read_demonstrations
from rewards.problems import EpochOrder
from workers.chunks import Problem
from workers.completions import Completions
from workers.engine import Vector
from workers.gradient import Batch, Outputs

Demonstrations = Callable[[Sequence[int], Problems], list[tuple[Problem, str | None]]]
"""Demonstrations by number, from 0 without end: problems and what to answer, None where the task knows no solution.
`Problems` are the task's."""


@dataclass(frozen=True, slots=True)
class SftLoss:
    """`losses.sft_loss` of samples of so many completion tokens together."""

    tokens: int

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[torch.Tensor, Mapping[str, torch.Tensor | float]]:
        loss = losses.sft_loss(outputs.logprobs(), batch.mask, normaliser=self.tokens)
        return loss.value, loss.sums


class Sft:
    """The `sft` method; implements `Method`."""

    slots = GRADIENT_SLOTS

    def __init__(
        self, config: SftMethodConfig, demonstrations: Demonstrations, completions: Completions, updates: Updates
    ) -> None:
        self.config = config
        self._demonstrations = demonstrations
        self._completions = completions
        self._updates = updates

    def step(self, pool: CallRunner, theta: Vector, step: int, progress: float, problems: Problems) -> Directions:
        """One update from a batch of demonstrations, less those without a solution; none where no problem has one."""
        started = time.perf_counter()
        batch = self.config.batch
        numbered = self._demonstrations(range(step * batch, (step + 1) * batch), problems)
        demonstrations = [(problem, completion) for problem, completion in numbered if completion is not None]
        samples = [self._completions.sample(problem, completion) for problem, completion in demonstrations]
        found: list[Gradient] = []
        if samples:
            loss = SftLoss(sum(len(sample.completion_ids) for sample in samples))
            found = [self._updates.gradient(pool, loss, samples, pool.put(theta), step)]
            yield -found[0].gradient
        spent = self._updates.costs(found)
        record = figures([]) | {
            "prompts": [problem.example.id for problem, _ in demonstrations],
            "reward_mean": None,
            "learning": self._updates.figures(found) if found else {},
            "times": {"learn": spent.worker_seconds, "rollouts": 0.0, "update": time.perf_counter() - started},
        }
        return Report(record, spent)


def demonstrations(
    data: str | None, batch: int, seed: int, task: SingleTurnTask, completions: Completions
) -> Demonstrations:
    """The demonstrations of method.data or, without it, of the task, of which there are `batch` in a step. Raises
    ValueError, naming method.data, for those that are none or that the model cannot learn."""
    if data is None:
        return _worked_solutions(task, batch)
    return _filed(data, seed, completions)


def _filed(source: str, seed: int, completions: Completions) -> Demonstrations:
    rows = read_demonstrations(source, "method.data")
    if not rows:
        raise ValueError(f"method.data: {source} has no demonstrations")
    for row in rows:
        completions.check(row.example, row.completion)
    order = EpochOrder(len(rows), seed, "demonstrations")

    def numbered(numbers: Sequence[int], problems: Problems) -> list[tuple[Problem, str | None]]:
        chosen = [rows[order[number]] for number in numbers]
        return [(completions.problem(row.example), row.completion) for row in chosen]

    return numbered


def _worked_solutions(task: SingleTurnTask, batch: int) -> Demonstrations:
    if all(_solution(task, number) is None for number in range(batch)):
        raise ValueError(
            f"method.data: got null, and the task knows no solution of its first {batch} problems; accepted is a file "
            "of demonstrations"
        )

    def numbered(numbers: Sequence[int], problems: Problems) -> list[tuple[Problem, str | None]]:
        return [
            (problem, _solution(task, number))
            for number, problem in zip(numbers, problems("train", numbers), strict=True)
        ]

    return numbered


def _solution(task: SingleTurnTask, number: int) -> str | None:
    try:
        return task.worked_solution(task.example("train", number))
    except ValueError:  # by which it says that it knows none
        return None
