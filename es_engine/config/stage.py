"""A stage of a run: what it changes of the run's own method, optimizer and budget."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from es_engine.config.base import ConfigModel
from es_engine.config.budget import BudgetConfig
from es_engine.config.method import EsMethodConfig, MethodConfig
from es_engine.config.optimizer import OptimizerConfig
from es_engine.config.reflection import default_kinds


class AxesConfig(ConfigModel):
    """A mapping of axes; where an axis has kinds and none is named, it is the axis's default."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_kinds(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kinds = default_kinds(cls)
        return {
            key: {"kind": kinds[key], **value} if key in kinds and isinstance(value, dict) else value
            for key, value in data.items()
        }


class StageConfig(AxesConfig):
    """A stage, whole: loading takes what the file leaves out from the run's own axes."""

    method: MethodConfig = Field(default=EsMethodConfig(), description="As the run's own method, which it replaces.")
    optimizer: OptimizerConfig = Field(description="As the run's own optimizer, which it replaces; its state is new.")
    budget: BudgetConfig = Field(description="As the run's own budget, which it replaces; it counts from the stage on.")
