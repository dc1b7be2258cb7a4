"""The config of Sudoku."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from es_engine.config.base import ConfigModel, NonNegativeFloat, PositiveInt, Text
from es_engine.config.tasks.base import SingleTurnTaskConfig
from rewards.base import SingleTurnTask
from rewards.sudoku import Sudoku

Range = Annotated[tuple[PositiveInt, PositiveInt], Field(strict=False)]


class SudokuWeightsConfig(ConfigModel):
    """What each component of Sudoku's reward weighs."""

    format: NonNegativeFloat = Field(default=0.1, description="Weight of an answer that can be read.")
    givens: NonNegativeFloat = Field(default=0.1, description="Weight of the share of givens that were kept.")
    cells: NonNegativeFloat = Field(default=0.3, description="Weight of the share of empty cells filled in right.")
    solved: NonNegativeFloat = Field(default=0.5, description="Weight of a solved puzzle.")


class SudokuStageConfig(ConfigModel):
    """One stage of a curriculum."""

    problems: PositiveInt = Field(description="How many training problems the stage has.")
    blanks: Range = Field(description="As task.blanks.")


class SudokuTaskConfig(SingleTurnTaskConfig):
    """Sudoku: fill in the empty cells so that every row, column and box holds every digit once."""

    makes: ClassVar[type[SingleTurnTask]] = Sudoku
    answer_column: ClassVar[str] = "solution"

    kind: Literal["sudoku"] = Field(default="sudoku", description="Fill in the empty cells of a grid by the rules.")
    size: Literal[4, 9] = Field(default=4, description="Rows, columns and digits of a grid.")
    blanks: Range = Field(
        default=(4, 8), description="The least and the most empty cells of a generated puzzle: to 12 of 16, 58 of 81."
    )
    curriculum: Annotated[tuple[SudokuStageConfig, ...], Field(strict=False)] = Field(
        default=(), description="Stages of the first training problems, in order; held-out problems have none."
    )
    template: Literal["plain", "chat", "r1"] = Field(default="chat", description="Form of the prompt and the answer.")
    data: Text | None = Field(
        default=None, description="File of puzzles, one a line or JSON lines; null: generated puzzles."
    )
    heldout_data: Text | None = Field(
        default=None, description="File of held-out puzzles; null: three in ten puzzles of data are held out."
    )
    weights: SudokuWeightsConfig | None = Field(
        default=None, description="Weights of the components of sudoku's reward; null: .1, .1, .3 and .5."
    )
