"""The config of the reasoning-gym task."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from es_engine.config.base import Text
from es_engine.config.tasks.base import TaskConfigModel
from rewards.base import Task
from rewards.reasoning_gym import ReasoningGym


class ReasoningGymTaskConfig(TaskConfigModel):
    """Any data set of reasoning-gym, which makes the problems and scores the answers."""

    kind: Literal["reasoning_gym"] = Field(
        default="reasoning_gym", description="A data set of the package reasoning-gym."
    )
    dataset: Text = Field(description="Name of the data set, such as chain_sum.")
    config: dict[str, Any] = Field(default={}, description="The data set's own settings, but for its seed and size.")
    template: Literal["chat", "plain"] = Field(
        default="chat", description="Form of the prompt: a chat answered in <answer> tags, or plain text."
    )

    def build(self) -> Task:
        """The task itself. Raises ValueError, naming the field, for a data set or settings that do not exist."""
        return ReasoningGym(**self.model_dump(exclude={"kind", "deadline", "memory_gb"}))
