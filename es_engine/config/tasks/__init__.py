"""The task axis: the problems and how answers to them are scored, one file a task."""

from es_engine.config.tasks.base import TaskConfigModel
from es_engine.config.tasks.countdown import CountdownTaskConfig

TaskConfig = CountdownTaskConfig

__all__ = ["CountdownTaskConfig", "TaskConfig", "TaskConfigModel"]
