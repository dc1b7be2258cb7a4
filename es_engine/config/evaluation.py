"""The evaluation axis: how the center is measured on held-out problems."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from es_engine.config.base import ConfigModel, NonNegativeFloat, NonNegativeInt, PositiveInt, problem


class EvaluationConfig(ConfigModel):
    """Held-out evaluation of the center, before the first generation, at intervals and at the end."""

    every: PositiveInt = Field(default=10, description="Generations between evaluations.")
    problems: PositiveInt = Field(
        default=128, description="Held-out problems; where there are fewer, each is asked once."
    )
    first: NonNegativeInt = Field(default=0, description="Number of the first of them.")
    samples: PositiveInt = Field(default=1, description="Completions of each problem.")
    temperature: NonNegativeFloat = Field(default=0.0, description="Sampling temperature; 0 is greedy.")
    chunk: PositiveInt = Field(default=128, description="Problems answered in one engine call.")

    @property
    def numbers(self) -> range:
        """The numbers of the held-out problems."""
        return range(self.first, self.first + self.problems)

    @model_validator(mode="after")
    def _sampling_is_possible(self) -> Self:
        if self.samples > 1 and self.temperature == 0:
            raise problem("samples", self.samples, "1 while temperature is 0")
        return self
