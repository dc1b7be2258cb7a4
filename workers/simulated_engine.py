"""Workers without a model, so that one machine can try the driver and the pool on hundreds of them.

Real are the driver, the pool, the chunks, the verifier and the sizes of what travels: theta and the noise sums have D
numbers. Made up are the answers, which depend on the seeds but not on theta; the noise, which is a short pattern
repeated, so that a run can neither learn nor be replayed; and the time that all of it takes, which is slept, not
worked. What is made up is a function of the seeds, so that a run's ledger does not depend on its workers here either.

The time of a chunk is that of one batch of continuous decoding in which all sequences start together. Lengths are
lognormal, cut at the task's limit. A decoding step takes `step_ms`, and `sequence_ms` more for every sequence still
running. A share `stragglers` of the chunks takes `slowdown` times as long. Reading the prompts takes no time. Writing
slots and summing noise take what they take on one CPU core.

Shapes: n completions of an engine call, D = len(theta).
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from es_engine.config import SimulatedEngineConfig
from es_engine.spaces.lora import LoraSpace
from rewards.base import NO_SCORE, Rollout, Score, VerifierSpec, judge_now
from workers.actor import Worker, WorkerSetup
from workers.chunks import Chunk, ChunkResult, Problem
from workers.engine import Completion, Filling, Member, Request, Sampling, Vector

DRAW_S = 4.2e-9
WRITE_S = 1.6e-9
SUM_S = 0.4e-9
"""Seconds for each number of a pair's noise that is drawn, of a slot that is written and of a pair that is summed."""

PATTERN = 4096
"""Numbers after which a pair's made-up noise repeats."""

OPERATIONS = "+-*/"


@dataclass(frozen=True, slots=True)
class Plan:
    """The n completions of an engine call, request by request: lengths in tokens, and when each is done, in seconds
    from the start of the call."""

    lengths: npt.NDArray[np.int64]
    seconds: npt.NDArray[np.float64]
    texts: list[str]


class SimulatedEngine:
    """Makes up answers and takes the time real ones would; implements `PopulationEngine`."""

    dtype = "auto"

    def __init__(self, config: SimulatedEngineConfig, run_seed: int, dim: int) -> None:
        self._config = config
        self._begin(run_seed, dim)

    def assign(self, space: LoraSpace, run_seed: int, cache_bytes: int) -> None:
        """Make up the answers of another run from now on."""
        self._begin(run_seed, space.dim)

    def _begin(self, run_seed: int, dim: int) -> None:
        self._run_seed = run_seed
        self._dim = dim
        self._generation = 0
        self._members: tuple[Member, ...] = ()

    def set_center(self, theta: Vector) -> None:
        """Take in theta, shape (D,), of which nothing depends."""
        assert theta.shape == (self._dim,)

    def write_slots(self, generation: int, sigma: float, members: Sequence[Member]) -> None:
        """Take the time to draw each pair's noise and to write each member's slot."""
        self._generation, self._members = generation, tuple(members)
        pairs = {member.pair for member in members if member.sign}
        time.sleep(self._dim * (DRAW_S * len(pairs) + WRITE_S * len(members)))

    def prepare(self, generation: int, sigma: float, members: Sequence[Member]) -> None:
        """Nothing: noise is made up where it is needed."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Completion]:
        """Complete the requests, each when its time has come."""
        started = time.monotonic()
        plan = self.plan(requests, sampling)
        for place in np.argsort(plan.seconds, kind="stable").tolist():
            _sleep_until(started + plan.seconds[place])
            cut = plan.lengths[place] > sampling.max_tokens
            yield Completion(
                request=place // sampling.samples,
                sample=place % sampling.samples,
                text="" if cut else plan.texts[place],
                token_ids=(0,) * min(int(plan.lengths[place]), sampling.max_tokens),
                finish_reason="length" if cut else "stop",
            )

    def rest(self) -> None:
        """Nothing: there is no memory to leave."""

    def wake(self) -> None:
        """Nothing."""

    def plan(self, requests: Sequence[Request], sampling: Sampling) -> Plan:
        """What will be answered and when: a function of the seeds, the slots' members and the requests."""
        config = self._config
        rng = np.random.default_rng([self._run_seed, self._generation, self._members[0].pair, requests[0].seed])
        count = len(requests) * sampling.samples
        spread = config.answer_spread * rng.standard_normal(count)
        lengths = np.ceil(config.answer_tokens * np.exp(spread)).astype(np.int64)
        slow = config.slowdown if rng.random() < config.stragglers else 1.0
        seconds = decoding_seconds(
            np.minimum(lengths, sampling.max_tokens), config.step_ms / 1000, config.sequence_ms / 1000
        )
        return Plan(lengths, slow * seconds, _expressions(rng, count))

    def logprobs(self, requests: Sequence[Request]) -> list[Vector]:
        """There is no model. Raises NotImplementedError."""
        raise NotImplementedError("a simulated engine knows no probabilities")

    def noise_sum(self, generation: int, pairs: Sequence[int], weights: Sequence[float]) -> Vector:
        """The sum of weight * made-up noise over pairs, in the order given, shape (D,)."""
        started = time.monotonic()
        total = np.zeros(PATTERN, dtype=np.float32)
        for pair, weight in zip(pairs, weights, strict=True):
            rng = np.random.default_rng([self._run_seed, generation, pair])
            total += np.float32(weight) * rng.standard_normal(PATTERN, dtype=np.float32)
        repeated = np.resize(total, self._dim)
        _sleep_until(started + SUM_S * self._dim * len(pairs))
        return repeated


def decoding_seconds(lengths: npt.NDArray[np.int64], step: float, sequence: float) -> npt.NDArray[np.float64]:
    """When each of n sequences that start together is done, shape (n,), in seconds.

    Decoding step s takes step + sequence * (sequences of at least s tokens), so one of L tokens is done after
    step * L + sequence * (the sum of min(length, L) over all).
    """
    ordered = np.sort(lengths)
    shorter = np.searchsorted(ordered, lengths)
    tokens = np.concatenate([[0], np.cumsum(ordered)])[shorter] + (len(lengths) - shorter) * lengths
    return step * lengths + sequence * tokens


def _expressions(rng: np.random.Generator, count: int) -> list[str]:
    """Answers that a Countdown verifier can read, and that are sometimes partly right."""
    numbers = rng.integers(1, 10, (count, 3)).tolist()
    operations = rng.integers(0, len(OPERATIONS), (count, 2)).tolist()
    return [
        f"{a}{OPERATIONS[first]}{b}{OPERATIONS[second]}{c}"
        for (a, b, c), (first, second) in zip(numbers, operations, strict=True)
    ]


def _sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))


class InlineScorer:
    """Scores with the task's verifier in this process: made-up answers are no danger to it. Used as `Scorer` is."""

    def __init__(self, verifier: VerifierSpec) -> None:
        """Raises ValueError where the verifier cannot be loaded."""
        self.failures: Counter[tuple[str, str]] = Counter()
        self.rescored = 0
        self._verifier = verifier.load()
        self._scores: dict[Hashable, Score] = {}

    def submit_group(self, keys: Sequence[Hashable], rollouts: Sequence[Rollout]) -> None:
        """Score rollouts. What the verifier raises is raised here."""
        scores = judge_now(self._verifier, rollouts, asyncio.run)
        self.failures["verifier", NO_SCORE] += sum(score.value is None for score in scores)
        self._scores.update(zip(keys, scores, strict=True))

    def drain(self) -> dict[Hashable, Score]:
        """The scores since the last drain, by key."""
        scores, self._scores = self._scores, {}
        return scores

    def close(self) -> None:
        """Nothing: there is no child."""


class SimulatedWorker(Worker):
    """A worker with a simulated engine, for which there is no canary.

    Its results have one more phase in `seconds`: `waited`, for work, since its last chunk of the same generation or,
    before the first one, since the generation reached this process, as `openings` tells the workers that share it.
    """

    def __init__(self, setup: WorkerSetup, index: int, openings: dict[tuple[int, int], float]) -> None:
        super().__init__(setup, index, None)
        self._openings = openings
        self._free_since = 0.0

    def start(self) -> dict[str, Any]:
        """Make engine and scorer; says where the worker runs."""
        config = self._setup.config
        assert isinstance(config.engine, SimulatedEngineConfig)
        self._engine = SimulatedEngine(config.engine, config.seed, self._setup.space.dim)
        self._open_task()
        return self._described()

    def assign(self, setup: WorkerSetup) -> dict[str, Any]:
        """As any worker; generations of the other run may have the same numbers."""
        self._openings.clear()
        return super().assign(setup)

    def _open_task(self) -> None:
        self._scorer = InlineScorer(self._setup.config.task.build().verifier)

    def evaluate(
        self, chunk: Chunk, batch: Sequence[Problem], theta: Vector, version: int, ahead: Filling | None = None
    ) -> ChunkResult:
        """As any worker, at a pace of its own."""
        now = time.perf_counter()
        opened = self._openings.setdefault((version, chunk.generation), now)
        result = super().evaluate(chunk, batch, theta, version)
        result.seconds["waited"] = now - max(opened, self._free_since)
        self._free_since = time.perf_counter()
        return result


class SimulatedWorkers:
    """The Ray actor of simulated workers: many in one process, each in a thread of its own while it works."""

    def __init__(self) -> None:
        self._workers: dict[int, SimulatedWorker] = {}
        self._openings: dict[tuple[int, int], float] = {}

    def carry_out(self, index: int, method: str, *arguments: Any) -> Any:
        """Have worker number `index` run a method of `Worker`; `start` makes the worker first, from its argument."""
        if method == "start":
            (setup,) = arguments
            self._workers[index] = SimulatedWorker(setup, index, self._openings)
            return self._workers[index].start()
        return getattr(self._workers[index], method)(*arguments)
