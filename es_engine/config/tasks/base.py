"""What every task's config has: the order of its problems, how completions end, who scores them and in what limits."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from es_engine.config.base import ConfigModel, PositiveFloat, PositiveInt, Seed, Text
from rewards.base import Task


class TaskConfigModel(ConfigModel):
    """The fields of every task; `kind` says which it is."""

    kind: str = Field(description="Which task it is.")
    seed: Seed = Field(default=0, description="Keys the choice and order of the problems.")
    max_tokens: PositiveInt | None = Field(
        default=None, description="Tokens a completion may have; null: what suits the template."
    )
    stop: Annotated[tuple[Text, ...], Field(strict=False)] | None = Field(
        default=None, description="Texts that end a completion; null: what suits the template."
    )
    verifier: Text | None = Field(
        default=None,
        description="Your own: path/to/file.py:function or package.module:function, behind trl:, verl:, openrlhf:, "
        "verifiers: or rg: a reward written for these; null: the task's.",
    )
    deadline: PositiveFloat = Field(default=5.0, description="Seconds the verifier may take for a rollout.")
    memory_gb: PositiveFloat | None = Field(
        default=None, description="Memory in GB a scoring process may use; null: no limit."
    )

    def build(self) -> Task:
        """The task itself. Raises ValueError, naming the field, for values that give no problems."""
        raise NotImplementedError
