"""The config of ARC-AGI-1."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from es_engine.config.base import ConfigModel, NonNegativeFloat, PositiveInt, Text
from es_engine.config.tasks.base import SingleTurnTaskConfig
from rewards.arc import Arc
from rewards.base import SingleTurnTask


class ArcWeightsConfig(ConfigModel):
    """What each component of ARC's reward weighs."""

    format: NonNegativeFloat = Field(default=0.1, description="Weight of grids that can be read.")
    shape: NonNegativeFloat = Field(default=0.1, description="Weight of the share of grids of the right size.")
    cells: NonNegativeFloat = Field(default=0.2, description="Weight of the share of right cells.")
    solved: NonNegativeFloat = Field(default=0.6, description="Weight of an exact solution.")


class ArcTaskConfig(SingleTurnTaskConfig):
    """ARC-AGI-1: find the rule that turns grids into grids, and apply it."""

    makes: ClassVar[type[SingleTurnTask]] = Arc

    kind: Literal["arc"] = Field(default="arc", description="Apply the rule that a few pairs of grids show.")
    data: Text = Field(description="Folder of problems, one JSON file each.")
    heldout_data: Text | None = Field(
        default=None, description="Folder of held-out problems; null: three in ten problems of data are held out."
    )
    max_cells: PositiveInt | None = Field(
        default=None, description="Leave out problems whose grids have more cells together; null: keep all."
    )
    template: Literal["chat", "plain"] = Field(default="chat", description="Form of the prompt.")
    weights: ArcWeightsConfig | None = Field(
        default=None, description="Weights of the components of arc's reward; null: .1, .1, .2 and .6."
    )
