"""Group relative policy optimisation (Shao et al., arXiv 2402.03300) and its variants, on the pool.

A step draws a group of completions of each prompt at the center, and goes over them `epochs` times in `minibatches`.
Where that is one update only, the probability ratio is 1 in value, and the old log-probabilities are the new ones;
otherwise the trainer computes them before the first update. The engine's own log-probabilities, whose numerics are not
the trainer's, only weigh tokens (truncated importance sampling). What has no gradient, for want of an advantage or for
being cut short, the trainer does not read.

Shapes: P prompts, n completions of each, T tokens of a completion, D = len(theta).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from es_engine import losses
from es_engine.config.method import GrpoMethodConfig
from es_engine.costs import Costs
from es_engine.methods import policy
from es_engine.methods.base import CallRunner, Directions, Problems, Report
from es_engine.methods.rollouts import total_costs
from es_engine.methods.updates import GRADIENT_SLOTS, Updates
from workers.engine import Sampling, Vector
from workers.gradient import Batch, Outputs
from workers.samples import Sample


@dataclass(frozen=True, slots=True)
class GrpoLoss:
    """`losses.policy_loss` of samples that have an `advantage`, are to be learned from or not (`learn`), and may have
    `old` and, of the engine, `sampled` log-probabilities."""

    variant: losses.Variant
    clip: tuple[float, float]
    beta: float
    normaliser: float
    temperature: float
    importance_cap: float | None

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[torch.Tensor, Mapping[str, torch.Tensor | float]]:
        mask = batch.mask & (batch.values["learn"] > 0)[:, None]
        new = outputs.logprobs(self.temperature)
        old = batch.values.get("old", new.detach())
        weights = None
        if self.importance_cap is not None:
            weights = losses.truncated_importance(old, batch.values["sampled"], mask, self.importance_cap)
        loss = losses.policy_loss(
            new,
            old,
            batch.values["advantage"],
            mask,
            variant=self.variant,
            clip=self.clip,
            normaliser=self.normaliser,
            beta=self.beta,
            reference=outputs.base.logprobs(self.temperature) if self.beta else None,
            weights=weights,
        )
        return loss.value, loss.sums


class Grpo:
    """The `grpo` method; implements `Method`."""

    slots = GRADIENT_SLOTS

    def __init__(self, config: GrpoMethodConfig, sampling: Sampling, updates: Updates) -> None:
        self.config = config
        self._sampling = replace(sampling, logprobs=config.importance_cap is not None)
        self._updates = updates

    def step(self, pool: CallRunner, theta: Vector, step: int, progress: float, problems: Problems) -> Directions:
        """Completions of a batch of prompts, and an update for each of its minibatches in each epoch."""
        config = self.config
        batch = problems("train", range(step * config.prompts, (step + 1) * config.prompts))
        shared = pool.put(theta)
        rollouts = policy.roll_out(pool, shared, step, batch, self._sampling, config.chunk)
        samples = self._samples(rollouts)
        learned = Costs()
        if config.updates > 1:
            samples, learned = self._with_old(pool, samples, shared, step * config.updates)
        found = yield from policy.learn(pool, shared, step, samples, self._loss, config, self._updates, self._teaches)
        learned += self._updates.costs(found, with_base=config.beta > 0)
        record = policy.record(rollouts) | {"learning": self._updates.figures(found)}
        record["times"]["learn"] = learned.worker_seconds
        return Report(record, total_costs(rollouts.results) + learned)

    def _with_old(
        self, pool: CallRunner, samples: Sequence[Sample], theta: Any, version: int
    ) -> tuple[list[Sample], Costs]:
        """The samples, those that teach something with their log-probabilities at theta; and what those cost."""
        teaching = [sample for sample in samples if self._teaches(sample)]
        rows, costs = self._updates.logprobs(pool, teaching, theta, version, self.config.temperature)
        old = iter(policy.with_values(teaching, "old", rows))
        return [next(old) if self._teaches(sample) else sample for sample in samples], costs

    def _teaches(self, sample: Sample) -> bool:
        return bool(sample.values["learn"]) and (self.config.beta > 0 or sample.values["advantage"] != 0)

    def _samples(self, rollouts: policy.Rollouts) -> list[Sample]:
        scale, mask_truncated = self.config.reward_scale, self.config.mask_truncated
        advantages = losses.advantages(torch.from_numpy(rollouts.rewards), scale).flatten().tolist()
        samples = []
        for problem, completion, advantage in zip(rollouts.asked, rollouts.completions, advantages, strict=True):
            learn = float(not (mask_truncated and completion.finish_reason == "length"))
            values = {"advantage": advantage, "learn": learn, **policy.sampled_logprobs(completion)}
            samples.append(Sample(problem.prompt_ids, completion.token_ids, values))
        return samples

    def _loss(self, samples: Sequence[Sample]) -> GrpoLoss:
        config = self.config
        lengths = [len(sample.completion_ids) if sample.values["learn"] else 0 for sample in samples]
        return GrpoLoss(
            variant=config.loss,
            clip=config.clip,
            beta=config.beta,
            normaliser=losses.policy_normaliser(config.loss, lengths, self._sampling.max_tokens),
            temperature=config.temperature,
            importance_cap=config.importance_cap,
        )
