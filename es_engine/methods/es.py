"""Evolution Strategies (Salimans et al., arXiv 1703.03864) in a subspace, with mirrored sampling.

For members theta + sigma*eps_i with shaped fitness w_i, the direction is (sigma/N) sum_i w_i eps_i: the natural
gradient of the expected fitness with respect to the center of N(theta, sigma^2 I) (Wierstra et al., JMLR 15, 2014),
which is sigma^2 times the usual gradient estimate. In these units a learning rate of 1 moves the center by the
weighted mean of the perturbations, whatever sigma is.

The sum is taken chunk by chunk by the workers that hold the noise and added here in chunk order, so that it does not
depend on who evaluated what. A few sums at a time are asked for, added and dropped, so that neither N x D numbers nor
the sums of all chunks are ever in one place. Shapes: N members, P prompts, D = len(theta).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from es_engine.config.method import EsMethodConfig
from es_engine.costs import Costs
from es_engine.methods import population as populations
from es_engine.methods import shaping
from es_engine.methods.base import CallRunner, Directions, Problems, Report
from es_engine.methods.fitness import Fitness, RewardFitness
from workers.calls import Call
from workers.chunks import Chunk, Problem, WeightedNoise
from workers.engine import Member, Sampling, Vector

Array = npt.NDArray[np.float64]
NoiseSum = Callable[[int, Sequence[int], Sequence[float]], Vector]

SUMS_AT_A_TIME = 8
"""Chunks' noise sums in the driver and in Ray's object store at once, of 4 D bytes each."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A direction for theta, shape (D,), None where the population showed none, the ledger's record of it, and what it
    cost."""

    direction: Vector | None
    record: dict[str, Any]
    costs: Costs


class EvolutionStrategies:
    """The `es` method: the fitness of a perturbed population to a direction."""

    def __init__(
        self,
        config: EsMethodConfig,
        *,
        chunk: int,
        sampling: Sampling,
        sigma: float | None = None,
        fitness: Fitness | None = None,
    ) -> None:
        """`sigma` is that of the beginning, None as long as it is to be calibrated; `fitness` None is the reward."""
        assert not (config.mirrored and chunk % 2), "a mirrored pair lies in one chunk"
        self.config = config
        self.fitness = fitness or RewardFitness()
        self.batch_size = populations.batch_size(config)
        self.chunk = self.slots = chunk
        self._sampling = sampling
        self._sigma = config.sigma if sigma is None and config.sigma != "auto" else sigma

    def step(self, pool: CallRunner, theta: Vector, step: int, progress: float, problems: Problems) -> Directions:
        """A generation: one direction, or none where the population shows none."""
        assert self._sigma is not None, "sigma is calibrated before the first generation"
        estimate = self.estimate(
            pool,
            pool.put(theta),
            version=step,
            batch=self.fitness.batch(range(step * self.batch_size, (step + 1) * self.batch_size), problems),
            generation=step,
            sigma=self._sigma * self.config.sigma_schedule.factor(progress),
            dim=len(theta),
        )
        if estimate.direction is not None:
            yield estimate.direction
        return Report(estimate.record, estimate.costs)

    def estimate(
        self,
        pool: CallRunner,
        theta: Any,
        version: int,
        batch: Sequence[Problem],
        generation: int,
        sigma: float,
        dim: int,
    ) -> Estimate:
        """Evaluate a generation around theta (as the pool shares it, of `dim` coordinates) and combine its noise into a
        direction."""
        started = time.perf_counter()
        chunks = self.chunks(generation, sigma)
        after = self.chunks(generation + 1, sigma)
        measured = self.fitness.measure(pool, chunks, batch, theta, version, after, self.config.min_pairs)
        evaluated = time.perf_counter()
        record = {
            "sigma": sigma,
            "members": [[member.pair, member.sign] for chunk in chunks for member in chunk.members],
            "chunks": [len(chunk.members) for chunk in chunks],
            "prompts": [problem.example.id for problem in batch],
            "fitness_spread": shaping.spread(shaping.fitness(self._with_means(measured.fitness))),
            **measured.record,
        }
        if given_up := [place for place, result in enumerate(measured.results) if result.absent]:
            record["absent"] = given_up
        workers = [result.worker for result in measured.results]
        summed = Costs()

        def noise_sums(jobs: Sequence[tuple[Chunk, list[float]]]) -> Iterator[Vector]:
            nonlocal summed
            calls = [
                Call(
                    f"the noise of {chunk}",
                    "noise_sum",
                    (generation, chunk.pairs, weights),
                    workers[chunk.index],
                    chunk=chunk.index,
                    fault=partial(_fault_of_noise, dim),
                )
                for chunk, weights in jobs
            ]
            for first in range(0, len(calls), SUMS_AT_A_TIME):
                for part in pool.run(calls[first : first + SUMS_AT_A_TIME]):
                    summed += part.costs
                    yield part.vector

        direction = self._combine(chunks, record, sigma, noise_sums)
        record["times"] |= {
            "noise": summed.worker_seconds,
            "rollouts": evaluated - started,
            "update": time.perf_counter() - evaluated,
        }
        record["workers"] = workers
        return Estimate(direction, record, measured.costs + summed)

    def replay(self, record: dict[str, Any], noise_sum: NoiseSum) -> Vector | None:
        """The direction of a recorded generation, bit for bit, from the noise alone. Raises ValueError for a record of
        something else."""
        generation, sigma = record["step"], record.get("sigma")
        chunks = self.chunks(generation, sigma or 0.0)
        members, absent = len(_compared(record)), record.get("absent", [])
        if sigma is None or members != self.config.population or not set(absent) < set(range(len(chunks))):
            raise ValueError(f"ledger: step {generation} is no generation of {self.config.population} members")
        return self._combine(
            chunks,
            record,
            sigma,
            lambda jobs: (noise_sum(generation, chunk.pairs, weights) for chunk, weights in jobs),
        )

    def with_population(self, size: int) -> EvolutionStrategies:
        """The same method with `size` members that all answer the same prompts."""
        return self._with(config=self.config.model_copy(update={"population": size, "sharing": "population"}))

    def with_chunk(self, size: int) -> EvolutionStrategies:
        """The same method with `size` members in a chunk."""
        return self._with(chunk=size)

    def with_sigma(self, sigma: float) -> EvolutionStrategies:
        """The same method, beginning at this sigma."""
        return self._with(sigma=sigma)

    def _with(self, **changes: Any) -> EvolutionStrategies:
        same: dict[str, Any] = {
            "config": self.config,
            "chunk": self.chunk,
            "sampling": self._sampling,
            "sigma": self._sigma,
            "fitness": self.fitness,
        }
        return EvolutionStrategies(**same | changes)

    def chunks(self, generation: int, sigma: float) -> list[Chunk]:
        """The generation's chunks: a function of the config alone, not of the workers."""
        count = self.config.population
        return populations.chunks(
            populations.members(count, self.config.mirrored),
            [populations.places(self.config, member) for member in range(count)],
            size=self.chunk,
            generation=generation,
            sigma=sigma,
            sampling=self._sampling,
        )

    def _combine(
        self,
        chunks: Sequence[Chunk],
        record: dict[str, Any],
        sigma: float,
        noise_sums: Callable[[Sequence[tuple[Chunk, list[float]]]], Iterable[Vector]],
    ) -> Vector | None:
        everyone = [member for chunk in chunks for member in chunk.members]
        fitness = whole_pairs(self._with_means(np.array(_compared(record), dtype=np.float64)), everyone)
        weights = shaping.shape(fitness, self.config.shaping)
        if weights is None:
            return None
        by_pair: defaultdict[int, float] = defaultdict(float)
        for member, weight in zip(everyone, weights.tolist(), strict=True):
            by_pair[member.pair] += member.sign * weight
        there = [chunk for chunk in chunks if chunk.index not in record.get("absent", ())]
        sums = iter(noise_sums([(chunk, [by_pair[pair] for pair in chunk.pairs]) for chunk in there]))
        total = np.float32(0) + next(sums)  # a copy: what workers send is read only
        for chunk_sum in sums:
            total += chunk_sum
        present = int((~np.isnan(shaping.fitness(fitness))).sum())
        total *= np.float32(sigma / present)
        return total

    def _with_means(self, fitness: Array) -> Array:
        return shaping.with_means(fitness, populations.sharers(self.config))


def _compared(record: dict[str, Any]) -> list[list[float | None]]:
    """What members were compared by, for each member and problem."""
    found: list[list[float | None]] = record["fitness"] if "fitness" in record else record.get("rewards", [])
    return found


def _fault_of_noise(dim: int, reply: WeightedNoise) -> str | None:
    """What is wrong with a worker's weighted sum of noise, if anything."""
    if reply.vector.shape != (dim,):
        return f"it has shape {reply.vector.shape}, not {(dim,)}"
    return None if np.isfinite(reply.vector).all() else "it is not finite"


def whole_pairs(fitness: Array, members: Sequence[Member]) -> Array:
    """Fitness (N, P) with a member without any score taken out together with its mirror image."""
    missing = {member.pair for member, row in zip(members, fitness, strict=True) if np.isnan(row).all()}
    kept = fitness.copy()
    for place, member in enumerate(members):
        if member.pair in missing:
            kept[place] = np.nan
    return kept
