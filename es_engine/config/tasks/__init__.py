"""The task axis: the problems and how answers to them are scored, one file a task."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from es_engine.config.tasks.arc import ArcTaskConfig
from es_engine.config.tasks.base import MultiTurnTaskConfig, SingleTurnTaskConfig, TaskConfigModel
from es_engine.config.tasks.chat import ChatTaskConfig
from es_engine.config.tasks.conciseness import ConcisenessTaskConfig
from es_engine.config.tasks.countdown import CountdownTaskConfig
from es_engine.config.tasks.environment import EnvironmentTaskConfig
from es_engine.config.tasks.guess import GuessTaskConfig
from es_engine.config.tasks.math import MathTaskConfig
from es_engine.config.tasks.reasoning_gym import ReasoningGymTaskConfig
from es_engine.config.tasks.sudoku import SudokuTaskConfig

TaskConfig = Annotated[
    CountdownTaskConfig
    | SudokuTaskConfig
    | MathTaskConfig
    | ArcTaskConfig
    | ConcisenessTaskConfig
    | ChatTaskConfig
    | ReasoningGymTaskConfig
    | GuessTaskConfig
    | EnvironmentTaskConfig,
    Field(discriminator="kind"),
]

LessonsTaskConfig = CountdownTaskConfig | SudokuTaskConfig
"""The tasks that the tiny model can be taught."""

__all__ = [
    "ArcTaskConfig",
    "ChatTaskConfig",
    "ConcisenessTaskConfig",
    "CountdownTaskConfig",
    "EnvironmentTaskConfig",
    "GuessTaskConfig",
    "LessonsTaskConfig",
    "MathTaskConfig",
    "MultiTurnTaskConfig",
    "ReasoningGymTaskConfig",
    "SingleTurnTaskConfig",
    "SudokuTaskConfig",
    "TaskConfig",
    "TaskConfigModel",
]
