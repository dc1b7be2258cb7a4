"""The config of conciseness."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from es_engine.config.base import ConfigModel, NonNegativeFloat, PositiveFloat, Text
from es_engine.config.tasks.base import SingleTurnTaskConfig
from rewards.base import SingleTurnTask
from rewards.conciseness import Conciseness


class ConcisenessWeightsConfig(ConfigModel):
    """What each component of the reward for conciseness weighs."""

    length: NonNegativeFloat = Field(default=1.0, description="Weight of the length.")
    correct: NonNegativeFloat = Field(default=0.0, description="Weight of a right answer.")


class ConcisenessTaskConfig(SingleTurnTaskConfig):
    """Conciseness: answer a question, and say no more than the shortest right answer does."""

    makes: ClassVar[type[SingleTurnTask]] = Conciseness

    kind: Literal["conciseness"] = Field(default="conciseness", description="Answer in as few characters as can be.")
    data: Text | None = Field(default=None, description="File of questions, JSON lines; null: the built-in ones.")
    heldout_data: Text | None = Field(
        default=None, description="File of held-out questions; null: three in ten questions of data are held out."
    )
    template: Literal["chat", "plain"] = Field(default="chat", description="Form of the prompt.")
    scale: PositiveFloat | None = Field(
        default=None, description="Characters too many that cost the whole reward for length; null: minus one for each."
    )
    weights: ConcisenessWeightsConfig | None = Field(
        default=None, description="Weights of the components of conciseness's reward; null: length 1, correct 0."
    )

    def reference(self, row: Mapping[str, Any]) -> str:
        """The shortest right answer of a data row, empty if it has none."""
        answers = row.get("answers")
        known = [answer for answer in answers if isinstance(answer, str)] if isinstance(answers, list) else []
        return min(known, key=len) if known else super().reference(row)
