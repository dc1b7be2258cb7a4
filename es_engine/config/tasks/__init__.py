"""The task axis: the problems and how answers to them are scored, one file a task."""

from typing import Annotated

from pydantic import Field

from es_engine.config.tasks.arc import ArcTaskConfig
from es_engine.config.tasks.base import TaskConfigModel
from es_engine.config.tasks.conciseness import ConcisenessTaskConfig
from es_engine.config.tasks.countdown import CountdownTaskConfig
from es_engine.config.tasks.math import MathTaskConfig

TaskConfig = Annotated[
    CountdownTaskConfig | MathTaskConfig | ArcTaskConfig | ConcisenessTaskConfig, Field(discriminator="kind")
]

__all__ = [
    "ArcTaskConfig",
    "ConcisenessTaskConfig",
    "CountdownTaskConfig",
    "MathTaskConfig",
    "TaskConfig",
    "TaskConfigModel",
]
