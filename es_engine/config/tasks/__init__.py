"""The task axis: the problems and how answers to them are scored, one file a task."""

from typing import Annotated

from pydantic import Field

from es_engine.config.tasks.base import TaskConfigModel
from es_engine.config.tasks.countdown import CountdownTaskConfig
from es_engine.config.tasks.reasoning_gym import ReasoningGymTaskConfig

TaskConfig = Annotated[CountdownTaskConfig | ReasoningGymTaskConfig, Field(discriminator="kind")]

__all__ = ["CountdownTaskConfig", "ReasoningGymTaskConfig", "TaskConfig", "TaskConfigModel"]
