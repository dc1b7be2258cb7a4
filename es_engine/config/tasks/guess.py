"""The config of the guessing game."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from es_engine.config.base import ConfigModel, NonNegativeFloat, PositiveInt
from es_engine.config.tasks.base import MultiTurnTaskConfig
from rewards.environments import MultiTurnTask
from rewards.guess import Guess

Number = Annotated[int, Field(ge=0, le=999_999_999)]


class GuessWeightsConfig(ConfigModel):
    """What each component of the guessing game's reward weighs."""

    format: NonNegativeFloat = Field(default=0.1, description="Weight of the share of turns that are guesses.")
    narrowed: NonNegativeFloat = Field(default=0.3, description="Weight of how far the range has been narrowed down.")
    solved: NonNegativeFloat = Field(default=0.6, description="Weight of having guessed the number.")


class GuessTaskConfig(MultiTurnTaskConfig):
    """Guess a number: a game of several turns, told after each guess whether the number is higher or lower."""

    makes: ClassVar[type[MultiTurnTask]] = Guess

    kind: Literal["guess"] = Field(default="guess", description="Find a number by guessing: several turns.")
    low: Number = Field(default=1, description="The least number of any game.")
    high: Number = Field(default=1000, description="The greatest number of any game.")
    span: Annotated[int, Field(ge=2)] = Field(default=100, description="Numbers that a game's range has.")
    turns: PositiveInt | None = Field(
        default=None, description="Guesses that a game has; null: the fewest that halving the range needs."
    )
    template: Literal["chat", "plain"] = Field(default="chat", description="Form of the prompt and of what follows it.")
    weights: GuessWeightsConfig | None = Field(
        default=None, description="Weights of the components of guess's reward; null: .1, .3 and .6."
    )
