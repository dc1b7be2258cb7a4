"""The budget axis: when a run ends."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from es_engine.config.base import ConfigModel, PositiveFloat, PositiveInt, problem
from es_engine.costs import Costs


class BudgetConfig(ConfigModel):
    """What the steps of a run may cost, evaluations apart; it ends after the step that reaches the first limit."""

    generations: PositiveInt | None = Field(
        default=None, description="Steps, which ES calls generations; null is no limit."
    )
    tokens: PositiveInt | None = Field(default=None, description="Generated tokens; null is no limit.")
    processed_tokens: PositiveInt | None = Field(
        default=None, description="Tokens read by a model, prompts and generated ones; null is no limit."
    )
    flops: PositiveFloat | None = Field(
        default=None, description="Estimated floating-point operations; null is no limit."
    )
    worker_seconds: PositiveFloat | None = Field(
        default=None,
        description="Seconds of all workers together; two runs may end at different steps; null is no limit.",
    )

    @model_validator(mode="after")
    def _has_a_limit(self) -> Self:
        if all(limit is None for limit in self.model_dump().values()):
            raise problem("generations", None, "an integer >= 1 while all other limits are null too")
        return self

    def progress(self, steps: int, costs: Costs) -> float:
        """The part of the budget that so many steps at such costs have spent: of the limits the one that is nearest,
        at most 1."""
        spent = (
            (steps, self.generations),
            (costs.generated, self.tokens),
            (costs.processed, self.processed_tokens),
            (costs.flops, self.flops),
            (costs.worker_seconds, self.worker_seconds),
        )
        return min(1.0, max(cost / limit for cost, limit in spent if limit is not None))
