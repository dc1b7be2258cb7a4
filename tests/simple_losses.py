"""Losses of the gradients' tests, importable on a worker of the pool."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from workers.gradient import Batch, Outputs

Result = tuple[torch.Tensor, Mapping[str, torch.Tensor | float]]


@dataclass(frozen=True)
class MeanNll:
    """The mean negative log-likelihood over `tokens` tokens."""

    tokens: int

    def __call__(self, outputs: Outputs, batch: Batch) -> Result:
        return -outputs.logprobs().sum() / self.tokens, {"tokens": batch.mask.sum(), "samples": len(batch.mask)}


@dataclass(frozen=True)
class Weighted:
    """Log-probabilities weighted by `advantage` of each sample and `weight` of each token, at a temperature."""

    temperature: float = 1.0

    def __call__(self, outputs: Outputs, batch: Batch) -> Result:
        weights = batch.values["advantage"][:, None] * batch.values["weight"]
        return -(weights * outputs.logprobs(self.temperature)).sum(), {"weight": weights.sum()}


def reverse_kl(outputs: Outputs, batch: Batch) -> Result:
    """The exact divergence KL(model | base), summed over the completion tokens."""
    mine, theirs = (each.logits().log_softmax(-1) for each in (outputs, outputs.base))
    divergence = batch.spread((mine.exp() * (mine - theirs)).sum(-1))
    return divergence.sum(), {"divergence": divergence.detach().sum()}


def squared_margins(outputs: Outputs, batch: Batch) -> Result:
    """The sum over pairs of samples side by side of a function of both."""
    first, second = outputs.logprobs().sum(-1).view(-1, 2).unbind(-1)
    return ((first - second) ** 2).sum() / 100, {}
