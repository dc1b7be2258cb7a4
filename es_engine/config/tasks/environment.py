"""The config of games of one's own."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from es_engine.config.base import Text
from es_engine.config.tasks.base import MultiTurnTaskConfig
from rewards.environment_task import EnvironmentTask
from rewards.environments import MultiTurnTask


class EnvironmentTaskConfig(MultiTurnTaskConfig):
    """Games of several turns in an environment of your own."""

    makes: ClassVar[type[MultiTurnTask]] = EnvironmentTask

    kind: Literal["environment"] = Field(default="environment", description="Games of an environment of your own.")
    environment: Text = Field(description="The environment: path/to/file.py:Class or package.module:Class.")
    options: dict[str, Any] = Field(default={}, description="Keyword arguments of the environment.")
    data: Text = Field(description="File of games, JSON lines: prompt or messages, and what the environment reads.")
    heldout_data: Text | None = Field(
        default=None, description="File of held-out games; null: three in ten games of data are held out."
    )
