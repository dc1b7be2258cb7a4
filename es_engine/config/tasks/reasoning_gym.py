"""The config of the reasoning-gym task."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from es_engine.config.base import Text
from es_engine.config.tasks.base import SingleTurnTaskConfig
from rewards.base import SingleTurnTask
from rewards.reasoning_gym import ReasoningGym


class ReasoningGymTaskConfig(SingleTurnTaskConfig):
    """Any data set of reasoning-gym, which makes the problems and scores the answers."""

    makes: ClassVar[type[SingleTurnTask]] = ReasoningGym

    kind: Literal["reasoning_gym"] = Field(
        default="reasoning_gym", description="A data set of the package reasoning-gym."
    )
    dataset: Text = Field(description="Name of the data set, such as chain_sum.")
    config: dict[str, Any] = Field(default={}, description="The data set's own settings, but for its seed and size.")
    template: Literal["chat", "plain"] = Field(
        default="chat", description="Form of the prompt: a chat answered in <answer> tags, or plain text."
    )
