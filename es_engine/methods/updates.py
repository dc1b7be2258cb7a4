"""Gradients as updates of theta: in micro-batches of a size, shortened to a norm, with what they cost.

Shapes: D = len(theta), T tokens of a completion.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from es_engine.config.method import GradientMethodConfig
from es_engine.costs import Costs, costs_of
from es_engine.methods import gradients
from es_engine.methods.base import CallRunner
from es_engine.methods.gradients import Gradient
from workers.engine import Vector
from workers.gradient import Loss
from workers.samples import Sample, suitable_tokens

GRADIENT_SLOTS = 2
"""Those of a method whose rollouts are the center's: its own, and the one beside it that the canary needs."""
PARTS = ("tokens", "pairs")
"""What the metrics of a loss are sums over: the one of these that is among them."""


@dataclass(frozen=True, slots=True)
class Updates:
    """How a method takes gradients of `dim` coordinates. `parameters` are those that multiply in the base model,
    `adapted` those of the model with its adapter."""

    config: GradientMethodConfig
    dim: int
    parameters: int
    adapted: int

    def micro_batch_tokens(self, samples: Sequence[Sample]) -> int:
        """How many tokens, padding included, the micro-batches may have that samples are cut into."""
        size = self.config.micro_batch_tokens
        return suitable_tokens(samples) if size == "auto" else size

    def gradient(
        self, pool: CallRunner, loss: Loss, samples: Sequence[Sample], theta: Any, version: int, *, together: int = 1
    ) -> Gradient:
        """The gradient of a loss over samples at theta (as the pool shares it), shortened where it is too long; its
        `norm`, before that, is among its metrics. `together` samples in a row stay in one micro-batch."""
        size = self.micro_batch_tokens(samples)
        found = gradients.gradient(
            pool, loss, samples, theta, version, dim=self.dim, max_tokens=size, together=together
        )
        norm = float(np.linalg.norm(found.gradient.astype(np.float64)))
        short = found.gradient
        if self.config.max_norm is not None and norm > self.config.max_norm:
            short = short * np.float32(self.config.max_norm / norm)
        return replace(found, gradient=short, metrics=found.metrics | {"norm": norm})

    def logprobs(
        self, pool: CallRunner, samples: Sequence[Sample], theta: Any, version: int, temperature: float = 1.0
    ) -> tuple[list[Vector], Costs]:
        """Log-probabilities (T,) of each sample's completion tokens at theta, or by the base model where theta is None,
        and what they cost."""
        found = gradients.logprobs(
            pool, samples, theta, version, max_tokens=self.micro_batch_tokens(samples), temperature=temperature
        )
        parameters = self.parameters if theta is None else self.adapted
        return found.rows, costs_of(parameters, found.tokens, seconds=found.seconds)

    def costs(self, found: Sequence[Gradient], *, with_base: bool = False) -> Costs:
        """What gradients cost; `with_base` where the base model read the samples too."""
        tokens, seconds = sum(each.tokens for each in found), sum(each.seconds for each in found)
        costs = costs_of(self.adapted, tokens, backward_tokens=tokens, seconds=seconds)
        return costs + costs_of(self.parameters, tokens) if with_base else costs

    def figures(self, found: Sequence[Gradient]) -> dict[str, float | None]:
        """What a step's gradients report: the mean loss and norm, and the losses' metrics over all that they are sums
        of."""
        sums: Counter[str] = Counter()
        for each in found:
            sums.update(each.metrics)
        norm = sums.pop("norm", 0.0) / max(1, len(found))
        number = next((sums.pop(part) for part in PARTS if part in sums), 0.0)
        averages = {name: total / number if number else None for name, total in sorted(sums.items())}
        return {"loss": sum(each.loss for each in found) / max(1, len(found)), "norm": norm, **averages}
