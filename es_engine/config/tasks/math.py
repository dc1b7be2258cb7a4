"""The config of maths problems."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from es_engine.config.base import ConfigModel, NonNegativeFloat, Text
from es_engine.config.tasks.base import SingleTurnTaskConfig
from rewards.base import SingleTurnTask
from rewards.math_data import reference_of
from rewards.maths import Maths

Forms = Annotated[tuple[Literal["boxed", "answer", "hash", "last_number"], ...], Field(strict=False, min_length=1)]


class MathFieldsConfig(ConfigModel):
    """The columns of a row that are read."""

    question: Text | None = Field(default=None, description="Column of the question; null: the data set's own.")
    answer: Text | None = Field(default=None, description="Column of the reference answer; null: the data set's own.")


class MathWeightsConfig(ConfigModel):
    """What each component of the reward for maths weighs."""

    format: NonNegativeFloat = Field(default=0.1, description="Weight of an answer that can be found.")
    correct: NonNegativeFloat = Field(default=0.9, description="Weight of a right answer.")


class MathTaskConfig(SingleTurnTaskConfig):
    """Maths problems with a final answer that can be checked."""

    makes: ClassVar[type[SingleTurnTask]] = Maths

    kind: Literal["math"] = Field(default="math", description="Solve maths problems from files or a hub.")
    data: Text = Field(description="File of problems (JSON lines or a JSON list), or hub:owner/name@config:split.")
    heldout_data: Text | None = Field(
        default=None, description="Held-out problems, as data; null: three in ten problems of data are held out."
    )
    dataset: Literal["gsm8k", "math500", "aime24", "amc23", "olympiadbench", "minerva", "custom"] = Field(
        default="custom", description="How a row's question and reference answer are read."
    )
    fields: MathFieldsConfig | None = Field(
        default=None, description="Columns of question and answer; null: the data set's own."
    )
    template: Literal["chat", "r1", "plain", "few_shot"] = Field(default="chat", description="Form of the prompt.")
    shots: Annotated[int, Field(ge=0, le=4)] = Field(default=2, description="Worked problems in a few_shot prompt.")
    forms: Forms | None = Field(
        default=None,
        description="How an answer is found: the first of these that is there; null: as the template asks.",
    )
    weights: MathWeightsConfig | None = Field(
        default=None, description="Weights of the components of math's reward; null: .1 and .9."
    )

    def reference(self, row: Mapping[str, Any]) -> str:
        """The answer of a data row, read as a row of the data set or, where it is not one, as the answer alone. Raises
        ValueError where it has none, unless none of those that score is the task's own verifier."""
        fields = self.fields.model_dump() if self.fields else {}
        return reference_of(row, self.dataset, fields, needed=self.asks_own_verifier)
