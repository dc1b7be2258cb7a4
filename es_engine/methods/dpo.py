"""Direct preference optimisation (Rafailov et al., arXiv 2305.18290), on the pool; its reference is the base model.

A step goes over a batch of pairs once: rows of a file or data set, in an order of its own for each epoch, or the best
and the worst of the center's own completions of each prompt, by the verifier.

Shapes: P prompts, n completions of each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from es_engine import losses
from es_engine.config.method import DpoMethodConfig
from es_engine.costs import Costs
from es_engine.methods import policy
from es_engine.methods.base import CallRunner, Directions, Problems, Report
from es_engine.methods.gradients import Gradient
from es_engine.methods.rollouts import figures, total_costs
from es_engine.methods.shaping import without_rounding_errors
from es_engine.methods.updates import GRADIENT_SLOTS, Updates
from rewards.demonstrations import read_preferences
from rewards.problems import EpochOrder
from workers.completions import Completions
from workers.engine import Sampling, Vector
from workers.gradient import Batch, Outputs
from workers.samples import Sample


@dataclass(frozen=True, slots=True)
class Pairs:
    """A step's pairs, the better of each and then the worse; what is recorded of how they came about, and its cost."""

    samples: list[Sample]
    record: dict[str, Any]
    costs: Costs


PairSource = Callable[[CallRunner, Any, int, Problems], Pairs]
"""The pairs of a step by (pool, theta as the pool shares it, step, the task's problems)."""


@dataclass(frozen=True, slots=True)
class DpoLoss:
    """`losses.dpo_loss` of samples in pairs, the better one first, of which there are so many together."""

    beta: float
    pairs: int

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[torch.Tensor, Mapping[str, torch.Tensor | float]]:
        own, base = (losses.sequence_logprobs(each.logprobs(), batch.mask) for each in (outputs, outputs.base))
        loss = losses.dpo_loss(own[::2], own[1::2], base[::2], base[1::2], beta=self.beta, normaliser=self.pairs)
        return loss.value, loss.sums


class Dpo:
    """The `dpo` method; implements `Method`."""

    slots = GRADIENT_SLOTS

    def __init__(self, config: DpoMethodConfig, source: PairSource, updates: Updates) -> None:
        self.config = config
        self._source = source
        self._updates = updates

    def step(self, pool: CallRunner, theta: Vector, step: int, progress: float, problems: Problems) -> Directions:
        """One update from a batch of pairs; none where there are no pairs."""
        started = time.perf_counter()
        shared = pool.put(theta)
        pairs = self._source(pool, shared, step, problems)
        drawn = time.perf_counter()
        count = len(pairs.samples) // 2
        found: list[Gradient] = []
        if count:
            loss = DpoLoss(self.config.beta, count)
            found = [self._updates.gradient(pool, loss, pairs.samples, shared, step, together=2)]
            yield -found[0].gradient
        learned = self._updates.costs(found, with_base=True)
        record = pairs.record | {"pairs": count, "learning": self._updates.figures(found) if found else {}}
        record["times"] |= {
            "learn": learned.worker_seconds,
            "rollouts": drawn - started,
            "update": time.perf_counter() - drawn,
        }
        return Report(record, pairs.costs + learned)


def pairs(config: DpoMethodConfig, seed: int, sampling: Sampling, completions: Completions) -> PairSource:
    """The pairs of `config.data` or, without it, of rollouts. Raises ValueError, naming method.data, for those that are
    none or that the model cannot learn."""
    if config.data is None:
        return _rolled_out(config.batch, config.chunk, sampling)
    return _filed(config.data, config.batch, seed, completions)


def _filed(source: str, batch: int, seed: int, completions: Completions) -> PairSource:
    rows = read_preferences(source, "method.data")
    if not rows:
        raise ValueError(f"method.data: {source} has no pairs")
    for row in rows:
        completions.check(row.example, row.chosen)
        completions.check(row.example, row.rejected)
    order = EpochOrder(len(rows), seed, "pairs")

    def of_step(pool: CallRunner, theta: Any, step: int, problems: Problems) -> Pairs:
        chosen = [rows[order[number]] for number in range(step * batch, (step + 1) * batch)]
        asked = [completions.problem(row.example) for row in chosen]
        samples = [
            completions.sample(problem, completion)
            for problem, row in zip(asked, chosen, strict=True)
            for completion in (row.chosen, row.rejected)
        ]
        record = figures([]) | {"prompts": [row.example.id for row in chosen], "reward_mean": None}
        return Pairs(samples, record, Costs())

    return of_step


def _rolled_out(batch: int, chunk: int, sampling: Sampling) -> PairSource:
    """The best and the worst completion of each prompt of a batch. A prompt whose completions have equal rewards, or
    fewer than two of which were scored, gives none."""

    def of_step(pool: CallRunner, theta: Any, step: int, problems: Problems) -> Pairs:
        asked = problems("train", range(step * batch, (step + 1) * batch))
        rollouts = policy.roll_out(pool, theta, step, asked, sampling, chunk)
        samples = []
        for prompt, rewards in enumerate(without_rounding_errors(rollouts.rewards, rollouts.rewards)):
            if not np.nanmax(rewards, initial=-np.inf) > np.nanmin(rewards, initial=np.inf):
                continue
            for place in (np.nanargmax(rewards), np.nanargmin(rewards)):
                completion = rollouts.completions[prompt * sampling.samples + int(place)]
                samples.append(Sample(asked[prompt].prompt_ids, completion.token_ids))
        return Pairs(samples, policy.record(rollouts), total_costs(rollouts.results))

    return of_step
