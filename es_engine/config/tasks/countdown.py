"""The config of Countdown."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from es_engine.config.base import ConfigModel, NonNegativeFloat, PositiveInt, Text
from es_engine.config.tasks.base import SingleTurnTaskConfig
from rewards.base import SingleTurnTask
from rewards.countdown import Countdown

Counts = Annotated[tuple[Annotated[int, Field(ge=2, le=6)], ...], Field(strict=False, min_length=1)]
Number = Annotated[int, Field(ge=1, le=1_000_000)]
Operations = Annotated[str, Field(pattern=r"^[-+*/]+$")]
Range = Annotated[tuple[PositiveInt, PositiveInt], Field(strict=False)]


class CountdownWeightsConfig(ConfigModel):
    """What each component of Countdown's reward weighs."""

    format: NonNegativeFloat = Field(default=0.1, description="Weight of an answer that can be read.")
    numbers: NonNegativeFloat = Field(default=0.2, description="Weight of the share of right numbers.")
    solved: NonNegativeFloat = Field(default=0.7, description="Weight of an exact solution.")


class CountdownStageConfig(ConfigModel):
    """One stage of a curriculum; what it leaves out is as the task has it."""

    problems: PositiveInt = Field(description="How many training problems the stage has.")
    numbers: Counts | None = Field(default=None, description="As task.numbers.")
    low: Number | None = Field(default=None, description="As task.low.")
    high: Number | None = Field(default=None, description="As task.high.")
    operations: Operations | None = Field(default=None, description="As task.operations.")
    targets: Range | None = Field(default=None, description="As task.targets.")
    solutions: Range | None = Field(default=None, description="As task.solutions.")


class CountdownTaskConfig(SingleTurnTaskConfig):
    """Countdown: write an expression of the given numbers, each exactly once, that equals the target."""

    makes: ClassVar[type[SingleTurnTask]] = Countdown
    answer_column: ClassVar[str] = "target"

    kind: Literal["countdown"] = Field(default="countdown", description="Reach a target with all the given numbers.")
    numbers: Counts = Field(default=(3,), description="How many numbers a problem has: one of these at random.")
    low: Number = Field(default=1, description="The least given number.")
    high: Number = Field(default=20, description="The greatest given number.")
    operations: Operations = Field(
        default="+-*/", description="Operations of the generated solutions; an answer may use all four."
    )
    targets: Range = Field(default=(1, 100), description="The least and the greatest generated target.")
    solutions: Range | None = Field(
        default=None, description="The least and the most solutions of a generated problem: few are hard; null: any."
    )
    curriculum: Annotated[tuple[CountdownStageConfig, ...], Field(strict=False)] = Field(
        default=(), description="Stages of the first training problems, in order; held-out problems have none."
    )
    template: Literal["plain", "few_shot", "chat", "r1", "dataset"] = Field(
        default="few_shot", description="Form of the prompt; dataset takes each row's own, under context."
    )
    shots: Annotated[int, Field(ge=0, le=4)] = Field(default=2, description="Worked lines in a few_shot prompt.")
    data: Text | None = Field(default=None, description="File of problems, JSON lines; null: generated problems.")
    heldout_data: Text | None = Field(
        default=None, description="File of held-out problems; null: three in ten problems of data are held out."
    )
    weights: CountdownWeightsConfig | None = Field(
        default=None, description="Weights of the components of countdown's reward; null: .1, .2 and .7."
    )
