"""On-policy distillation: Agarwal et al., arXiv 2306.13649; Lu and Thinking Machines Lab, "On-Policy Distillation"
(2025).

A step draws completions at the center, and has a teacher say at every token how it would have gone on: the divergence
KL(student || teacher) of each token is brought down, whatever the reward. The exact form sums over the vocabulary, on
the worker and at every update; the sampled form knows of the teacher only the log-probability of the token that was
drawn, which is asked for once a step. A token answers for its own divergence alone, not for those that it leads to.

Student and teacher may have the same vocabulary in outputs of other sizes. The exact form compares the first outputs,
which both have; the sampled form has nothing to learn of a token that the teacher lacks.

Shapes: P prompts, n completions of each, T tokens of a completion, D = len(theta).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from es_engine import losses
from es_engine.config.method import OpdMethodConfig
from es_engine.costs import Costs, costs_of
from es_engine.methods import gradients, policy
from es_engine.methods.base import CallRunner, Directions, Problems, Report
from es_engine.methods.rollouts import total_costs
from es_engine.methods.updates import GRADIENT_SLOTS, Updates
from workers.engine import Sampling, Vector
from workers.gradient import Batch, Loss, Outputs
from workers.samples import Sample


@dataclass(frozen=True, slots=True)
class SampledLoss:
    """`losses.opd_sampled_loss` of samples that have the `teacher`'s log-probabilities, and may have `old` and, of the
    engine, `sampled` ones."""

    normaliser: float
    temperature: float = 1.0
    importance_cap: float | None = None

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[torch.Tensor, Mapping[str, torch.Tensor | float]]:
        new = outputs.logprobs(self.temperature)
        old = batch.values.get("old", new.detach())
        teacher = batch.values["teacher"]
        mask = batch.mask & teacher.isfinite()
        weights = None
        if self.importance_cap is not None:
            weights = losses.truncated_importance(old, batch.values["sampled"], mask, self.importance_cap)
        loss = losses.opd_sampled_loss(new, old, teacher, mask, normaliser=self.normaliser, weights=weights)
        return loss.value, loss.sums


@dataclass(frozen=True, slots=True)
class ExactLoss:
    """`losses.opd_exact_loss` of samples, against the worker's teacher."""

    normaliser: float
    temperature: float = 1.0

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[torch.Tensor, Mapping[str, torch.Tensor | float]]:
        teacher = outputs.teacher.logits(self.temperature)
        student = outputs.logits(self.temperature)[:, : teacher.shape[-1]]
        divergences = batch.spread(losses.reverse_kl(student, teacher))
        loss = losses.opd_exact_loss(divergences, batch.mask, normaliser=self.normaliser)
        return loss.value, loss.sums


class Opd:
    """The `opd` method; implements `Method`. `teacher_parameters` are those of the teacher that multiply."""

    slots = GRADIENT_SLOTS

    def __init__(self, config: OpdMethodConfig, sampling: Sampling, updates: Updates, teacher_parameters: int) -> None:
        self.config = config
        self._sampling = replace(sampling, logprobs=config.weighted)
        self._updates = updates
        self._teacher_parameters = teacher_parameters

    def step(self, pool: CallRunner, theta: Vector, step: int, progress: float, problems: Problems) -> Directions:
        """Completions of a batch of prompts, and an update for each of its minibatches in each epoch."""
        config = self.config
        batch = problems("train", range(step * config.prompts, (step + 1) * config.prompts))
        shared = pool.put(theta)
        rollouts = policy.roll_out(pool, shared, step, batch, self._sampling, config.chunk)
        samples = [
            Sample(problem.prompt_ids, completion.token_ids, policy.sampled_logprobs(completion))
            for problem, completion in zip(rollouts.asked, rollouts.completions, strict=True)
        ]
        learned = Costs()
        if config.form == "sampled":
            samples, learned = self._judged(pool, shared, step, samples)
        found = yield from policy.learn(pool, shared, step, samples, self._loss, config, self._updates)
        learned += self._updates.costs(found)
        if config.form == "exact":
            learned += costs_of(self._teacher_parameters, sum(each.tokens for each in found))
        record = policy.record(rollouts) | {"learning": self._updates.figures(found)}
        record["times"]["learn"] = learned.worker_seconds
        return Report(record, total_costs(rollouts.results) + learned)

    def _judged(
        self, pool: CallRunner, theta: object, step: int, samples: Sequence[Sample]
    ) -> tuple[list[Sample], Costs]:
        """The samples with what the sampled form needs to know of them, and what that cost."""
        config = self.config
        teacher = gradients.teacher_logprobs(
            pool, samples, max_tokens=self._updates.micro_batch_tokens(samples), temperature=config.temperature
        )
        judged = policy.with_values(samples, "teacher", teacher.rows)
        spent = costs_of(self._teacher_parameters, teacher.tokens, seconds=teacher.seconds)
        if config.updates > 1:
            old, costs = self._updates.logprobs(pool, samples, theta, step * config.updates, config.temperature)
            return policy.with_values(judged, "old", old), spent + costs
        return judged, spent

    def _loss(self, samples: Sequence[Sample]) -> Loss:
        config = self.config
        tokens = float(sum(len(sample.completion_ids) for sample in samples))
        if config.form == "exact":
            return ExactLoss(tokens, config.temperature)
        return SampledLoss(tokens, config.temperature, config.importance_cap)
