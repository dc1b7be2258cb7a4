"""Tasks of several turns: an environment answers each completion, until the game is over.

An environment has no memory. Where a game stands is its state, plain data that JSON can write, so that a game can go on
in another process, and many games in step: `begin` each, and as long as any is not done, let the model complete the
`next_prompt` of all those in one batch and `advance` each by its completion. `play` does that for one game.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from rewards.base import Example, Message, Score

State = dict[str, Any]
Policy = Callable[[Sequence[Message]], str]
"""What plays a game: the next completion, given the messages so far."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What came of a completion.

    `state` is where the game stands now; `observation` what the environment says to the model. `rewards` are this
    turn's, by name and already weighted: over all turns of a game their sum is from 0 to 1. An environment gives the
    same names every turn. A game that is `done` goes on no more; `solved` says that it ended well.
    """

    state: State
    observation: str
    rewards: dict[str, float]
    done: bool = False
    solved: bool = False


class Environment(Protocol):
    """A game, as two functions without side effects, equal for equal arguments: what is random in a game is drawn by
    its example, or keyed by it. After `max_turns` turns a game is over, whatever `step` says."""

    max_turns: int

    def reset(self, example: Example) -> State:
        """The state at the beginning. The model's first prompt is the example's own."""
        ...

    def step(self, state: State, completion: str) -> Turn:
        """What comes of a completion, which may be any text. The state passed in is left as it is."""
        ...


EnvironmentFactory = Callable[..., Environment]


@dataclass(frozen=True, slots=True)
class EnvironmentSpec:
    """An environment by name, so that it can cross a process boundary as plain data: one that is registered, with
    keyword arguments for its factory."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def load(self) -> Environment:
        """Make the environment. Raises ValueError where none has the name."""
        if self.name not in _REGISTRY:
            known = ", ".join(sorted(_REGISTRY))
            raise ValueError(f"environment: no environment is called {self.name!r}; accepted are {known}")
        return _REGISTRY[self.name](**self.options)


def register_environment(name: str) -> Callable[[EnvironmentFactory], EnvironmentFactory]:
    """Decorator: make a factory of environments, or a class, known under a name."""

    def add(factory: EnvironmentFactory) -> EnvironmentFactory:
        if name in _REGISTRY:
            raise ValueError(f"environment: the name {name!r} is taken")
        _REGISTRY[name] = factory
        return factory

    return add


_REGISTRY: dict[str, EnvironmentFactory] = {}


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A game so far: its state, the transcript from the first prompt to the last observation, and the rewards of all
    its turns by name."""

    state: State
    messages: tuple[Message, ...]
    rewards: dict[str, float] = field(default_factory=dict)
    turns: int = 0
    done: bool = False
    solved: bool = False


def begin(environment: Environment, example: Example) -> Trajectory:
    """The game of an example before its first turn."""
    opening = example.messages or ({"role": "user", "content": example.prompt or ""},)
    return Trajectory(environment.reset(example), opening)


def next_prompt(example: Example, trajectory: Trajectory) -> Example:
    """The example with the whole transcript as its prompt: as messages if it is a chat, else as text, in which prompt,
    completions and observations follow one another with nothing between them."""
    if example.messages is not None:
        return replace(example, messages=trajectory.messages)
    return replace(example, prompt="".join(message["content"] for message in trajectory.messages))


def advance(environment: Environment, trajectory: Trajectory, completion: str) -> Trajectory:
    """The game one turn on. Raises ValueError for a game that is done."""
    if trajectory.done:
        raise ValueError("environment: the game is done; it takes no further completion")
    turn = environment.step(trajectory.state, completion)
    spoken = ({"role": "assistant", "content": completion}, {"role": "user", "content": turn.observation})
    return Trajectory(
        state=turn.state,
        messages=trajectory.messages + spoken,
        rewards={name: trajectory.rewards.get(name, 0.0) + reward for name, reward in turn.rewards.items()},
        turns=trajectory.turns + 1,
        done=turn.done or trajectory.turns + 1 >= environment.max_turns,
        solved=turn.solved,
    )


def play(environment: Environment, example: Example, policy: Policy) -> Trajectory:
    """A whole game, played by a policy."""
    trajectory = begin(environment, example)
    while not trajectory.done:
        trajectory = advance(environment, trajectory, policy(trajectory.messages))
    return trajectory


def score_of(trajectory: Trajectory) -> Score:
    """The score of a game: the sum of its rewards, these by name, and whether it was solved as the accuracy, 0 or 1."""
    return Score(sum(trajectory.rewards.values()), dict(trajectory.rewards), accuracy=float(trajectory.solved))
