"""Workers without models: members are scored by a function of their theta, in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from es_engine.costs import Costs, costs_of
from rewards.base import NO_SCORE, Example
from workers.calls import Call
from workers.chunks import Chunk, ChunkResult, Problem, Transcript, WeightedNoise
from workers.engine import Vector
from workers.perturbation import Perturber

PARAMETERS = 1000
"""Of the model that there is none of."""

Reward = Callable[[Vector, Problem, int], float]
"""(theta, problem, number of the sample) to a reward; NaN is no score."""


class FunctionWorker:
    """One worker, with noise of its own; a rollout is right when its reward is at least 1."""

    def __init__(self, index: int, reward: Reward, dim: int, seed: int) -> None:
        self.index = index
        self.reward = reward
        self.perturber = Perturber(seed, dim, cache_bytes=10**7)
        self.failure = NO_SCORE  # what a reward of NaN counts as

    def evaluate(
        self, chunk: Chunk, batch: Sequence[Problem], theta: Vector, version: int, ahead: object = None
    ) -> ChunkResult:
        self.perturber.center = theta
        rewards = np.array(
            [
                self._rewards_of(self.perturber.theta(chunk.generation, chunk.sigma, member), chunk, batch, places)
                for member, places in zip(chunk.members, chunk.problems, strict=True)
            ]
        )
        problems = [[batch[place] for place in places] for places in chunk.problems]
        prompt_tokens = sum(len(problem.prompt_ids) for row in problems for problem in row)
        generated = 3 * rewards.size
        return ChunkResult(
            rewards=rewards,
            accuracy=np.where(np.isnan(rewards), np.nan, rewards >= 1),
            components={"exact": rewards / 2},
            tokens=np.full(rewards.shape, 3),
            truncated=1,
            looped=2,
            prompt_tokens=prompt_tokens,
            failures={("mine", self.failure): int(np.isnan(rewards).sum())},
            error=None if self.failure == NO_SCORE else "it hung",
            transcripts=[
                [
                    [Transcript(f"{each.example.id}/{sample}") for sample in range(chunk.sampling.samples)]
                    for each in row
                ]
                for row in problems
            ]
            if chunk.keep_text
            else None,
            seconds={"generate": 0.5},
            costs=costs_of(PARAMETERS, prompt_tokens + generated, generated=generated, seconds=0.5),
            worker=self.index,
        )

    def noise_sum(self, generation: int, pairs: Sequence[int], weights: Sequence[float]) -> WeightedNoise:
        return WeightedNoise(self.perturber.noise_sum(generation, pairs, weights), Costs(worker_seconds=0.25))

    def _rewards_of(
        self, theta: Vector, chunk: Chunk, batch: Sequence[Problem], places: Sequence[int]
    ) -> list[list[float]]:
        return [
            [self.reward(theta, batch[place], sample) for sample in range(chunk.sampling.samples)] for place in places
        ]


class FunctionRunner:
    """Gives call number i to worker (turn + i) mod workers, whichever worker it prefers, last call first."""

    def __init__(self, reward: Reward, dim: int, *, workers: int = 1, turn: int = 0, seed: int = 1) -> None:
        self.workers = [FunctionWorker(index, reward, dim, seed) for index in range(workers)]
        self.turn = turn
        self.calls: list[Call] = []

    @property
    def size(self) -> int:
        return len(self.workers)

    def put(self, value: Any) -> Any:
        return value

    def run(self, calls: Sequence[Call]) -> list[Any]:
        self.calls += calls
        results: dict[int, Any] = {}
        for number, call in reversed(list(enumerate(calls))):
            worker = self.workers[(self.turn + number) % len(self.workers)]
            results[number] = getattr(worker, call.method)(*call.arguments)
        return [results[number] for number in range(len(calls))]


def problems(count: int) -> list[Problem]:
    return [
        Problem(Example(f"p{number}", answer=str(number), info={}), f"prompt {number}", tuple(range(number + 1)))
        for number in range(count)
    ]
