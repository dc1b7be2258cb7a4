"""The config of chat prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from es_engine.config.base import ConfigModel, NonNegativeInt, PositiveInt, Text, problem
from es_engine.config.tasks.base import OWN, SingleTurnTaskConfig
from rewards.base import SingleTurnTask
from rewards.chat import Chat


class ChatFieldsConfig(ConfigModel):
    """The columns of a row that are read."""

    prompt: Text | None = Field(default=None, description="Column of the prompt; null: prompt, or else messages.")
    answer: Text | None = Field(default=None, description="Column of a good answer; null: answer, if there is one.")


class ChatTaskConfig(SingleTurnTaskConfig):
    """Chat: answer prompts of yours, scored by a reward model or by a verifier of yours."""

    makes: ClassVar[type[SingleTurnTask]] = Chat

    kind: Literal["chat"] = Field(
        default="chat", description="Answer prompts as a reward model, or your verifier, likes it."
    )
    data: Text = Field(description="File of prompts (JSON lines or a JSON list), or hub:owner/name@config:split.")
    heldout_data: Text | None = Field(
        default=None, description="Held-out prompts, as data; null: three in ten prompts of data are held out."
    )
    fields: ChatFieldsConfig | None = Field(default=None, description="Columns of prompt and answer; null: as named.")
    system: Text | None = Field(default=None, description="System message of a chat that has none; null: none.")
    template: Literal["chat", "plain"] = Field(
        default="chat", description="Form of the prompt: a chat, or the prompt's text as it stands."
    )
    reward_model: Text | None = Field(
        default=None, description="Sequence classifier that scores, a local folder or a hub id; null: others do."
    )
    max_length: PositiveInt = Field(
        default=2048, description="Tokens that the reward model reads of prompt and completion: the last ones."
    )
    output: NonNegativeInt = Field(default=0, description="Which logit of the reward model is the score.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="cpu",
        description="Where the reward model runs; auto is cuda where there is one. On a GPU, what "
        "engine.gpu_memory_utilization leaves has to hold it.",
    )

    @model_validator(mode="after")
    def _something_scores(self) -> Self:
        if self.reward_model is None and self.asks_own_verifier:
            accepted = f"a model, unless task.verifier or parts of task.reward, none of them {OWN}, score the answers"
            raise problem("reward_model", None, accepted)
        return self

    def reference(self, row: Mapping[str, Any]) -> str:
        """The good answer of a data row, empty if it has none."""
        column = (self.fields and self.fields.answer) or self.answer_column
        return super().reference({"answer": row.get(column)})

    def build(self) -> SingleTurnTask:
        """The task itself. Raises ValueError, naming the field, for values that give no prompts."""
        if self.reward_model is not None or self.verifier is not None:
            return super().build()
        assert self.reward is not None
        # No part asks the task's own verifier: any will do in its place.
        stand_in = next(iter(self.reward.values())).verifier
        return self.model_copy(update={"verifier": stand_in}).build()
