"""What every task's config has: the order of its problems, how completions end, and in what limits they are scored.

Those of one turn also have a choice of who scores them; a game of several turns is scored by its environment.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from es_engine.config.base import ConfigModel, PositiveFloat, PositiveInt, Seed, Text, problem
from rewards.base import SingleTurnTask, Task, VerifierSpec
from rewards.environments import MultiTurnTask

OWN = "task"
"""The name, in a part of a reward, of the verifier that the task has without it."""


class RewardPartConfig(ConfigModel):
    """One term of a reward: a weight times what a verifier says."""

    verifier: Text = Field(default=OWN, description="Who says it, as in task.verifier; task is the task's verifier.")
    options: dict[str, Any] = Field(default={}, description="Keyword arguments of a registered verifier.")
    of: Text | None = Field(
        default=None, description="Which of its numbers: accuracy, or a component by name; null: its value."
    )
    weight: float = Field(default=1.0, description="What it is multiplied by.")
    clip: Annotated[tuple[float, float], Field(strict=False)] | None = Field(
        default=None, description="The least and the greatest number, before the weight; null: any."
    )
    gate: Text | None = Field(
        default=None, description="Another part, without which (its number 0 or less) this one counts 0; null: none."
    )

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.verifier == OWN and self.options:
            raise problem("options", self.options, "nothing for the task's own verifier")
        if self.clip is not None and self.clip[0] > self.clip[1]:
            raise problem("clip", self.clip, "[the least, the greatest]")
        return self

    def arguments(self, own: VerifierSpec) -> dict[str, Any]:
        """The keyword arguments of a `rewards.composition.Part`, where the task's own verifier is `own`."""
        arguments = self.model_dump()
        return arguments | {"verifier": own.name, "options": own.options} if self.verifier == OWN else arguments


class TaskConfigModel(ConfigModel):
    """The fields of every task; `kind` says which it is."""

    makes: ClassVar[type[Task]]

    kind: str = Field(description="Which task it is.")
    seed: Seed = Field(default=0, description="Keys the choice and order of the problems.")
    max_tokens: PositiveInt | None = Field(
        default=None, description="Tokens a completion may have; null: what suits the template."
    )
    stop: Annotated[tuple[Text, ...], Field(strict=False)] | None = Field(
        default=None, description="Texts that end a completion; null: what suits the template."
    )
    deadline: PositiveFloat = Field(default=5.0, description="Seconds the verifier may take for a rollout.")
    memory_gb: PositiveFloat | None = Field(
        default=None, description="Memory in GB a scoring process may use; null: no limit."
    )

    def build(self) -> Task:
        """The task itself. Raises ValueError, naming the field, for values that give no problems."""
        return self.makes(**self.model_dump(exclude={"kind", "deadline", "memory_gb"}))


class SingleTurnTaskConfig(TaskConfigModel):
    """The fields of every task whose problems are answered with one completion."""

    makes: ClassVar[type[SingleTurnTask]]
    answer_column: ClassVar[str] = "answer"
    """Where a row of the task has its answer."""

    verifier: Text | None = Field(
        default=None,
        description="Your own: path/to/file.py:function or package.module:function; null: the task's.",
    )
    reward: Annotated[dict[str, RewardPartConfig], Field(min_length=1)] | None = Field(
        default=None, description="Parts, by name, whose sum is the reward; null: what the verifier says."
    )

    @model_validator(mode="after")
    def _gates_are_parts(self) -> Self:
        for name, part in (self.reward or {}).items():
            others = [other for other in self.reward or {} if other != name]
            if part.gate is not None and part.gate not in others:
                raise problem(f"reward.{name}.gate", part.gate, f"null or another part ({', '.join(others) or 'none'})")
        return self

    def build(self) -> SingleTurnTask:
        """The task itself. Raises ValueError, naming the field, for values that give no problems."""
        task = self.makes(**self.model_dump(exclude={"kind", "reward", "deadline", "memory_gb"}))
        if self.reward is not None:
            parts = [{"name": name, **part.arguments(task.verifier)} for name, part in self.reward.items()]
            task.verifier = VerifierSpec("sum", {"parts": parts})
        return task

    def reference(self, row: Mapping[str, Any]) -> str:
        """The answer of a data row as training reads it, or else what it has under `answer`; empty if it has none.
        Raises ValueError where the task's verifier needs one."""
        given = (row.get(self.answer_column), row.get("answer"))
        return next((str(answer) for answer in given if answer is not None), "")

    @property
    def asks_own_verifier(self) -> bool:
        """Whether the task's own verifier has a say."""
        asked = [part.verifier for part in (self.reward or {}).values()] or [OWN]
        return self.verifier is None and OWN in asked


class MultiTurnTaskConfig(TaskConfigModel):
    """The fields of every task whose problems are games of several turns."""

    makes: ClassVar[type[MultiTurnTask]]

    max_tokens: PositiveInt | None = Field(
        default=None, description="Tokens a turn's completion may have; null: what suits the task."
    )
    stop: Annotated[tuple[Text, ...], Field(strict=False)] | None = Field(
        default=None, description="Texts that end a turn's completion; null: what suits the task."
    )
    deadline: PositiveFloat = Field(default=5.0, description="Seconds the environment may take for a turn.")

    @model_validator(mode="before")
    @classmethod
    def _the_environment_scores(cls, data: Any) -> Any:
        for field in ("verifier", "reward"):
            if isinstance(data, dict) and data.get(field) is not None:
                raise problem(field, data[field], "nothing: a game is scored by its environment, turn by turn")
        return data

    def build(self) -> MultiTurnTask:
        """The task itself. Raises ValueError, naming the field, for values that give no games."""
        return self.makes(**self.model_dump(exclude={"kind", "deadline", "memory_gb"}))
