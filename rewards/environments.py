"""Tasks of several turns: an environment answers each completion, until the game is over.

An environment has no memory. Where a game stands is its state, plain data that JSON can write, so that a game can go on
in another process, and many games in step: `begin` each, and as long as any is not done, let the model complete the
`next_prompt` of all those in one batch and `advance` each by its completion. `play` does that for one game.

Since `step` sees what a model wrote, it belongs where verifiers run. A turn is therefore also a rollout: `turn_rollout`
asks for one, the verifier `turn` takes it, wherever that is, and `turn_of` reads what came back. To whoever asks, the
state is a text that is handed back as it came, never read.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from rewards.base import Example, Message, Rollout, Score, Task, Verifier, VerifierSpec, load_function, register

State = Any
"""Plain data that JSON can write."""
Policy = Callable[[Sequence[Message]], str]
"""What plays a game: the next completion, given the messages so far."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What came of a completion.

    `state` is where the game stands now; `observation` what the environment says to the model. `rewards` are this
    turn's, by name and already weighted: over all turns of a game their sum should be from 0 to 1. A game that is
    `done` goes on no more; `solved` says that it ended well.
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
    """An environment by name, so that it can cross a process boundary as plain data: one that is registered,
    `path/to/file.py:Class` or `package.module:Class`, with keyword arguments for its factory."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def load(self) -> Environment:
        """Make the environment. Raises ValueError where none has the name, or what has it is none."""
        factory = self._factory()
        try:
            inspect.signature(factory).bind(**self.options)
        except TypeError as error:
            raise ValueError(f"environment: {self.name} does not take these options ({error})") from error
        made = factory(**self.options)
        for need in ("reset", "step", "max_turns"):
            if not hasattr(made, need):
                raise ValueError(f"environment: {self.name} has no {need}; it needs reset, step and max_turns")
        return made

    @property
    def verifier(self) -> VerifierSpec:
        """The verifier that takes its turns (see `turn_rollout`)."""
        return VerifierSpec("turn", {"environment": self.name, "options": self.options})

    def _factory(self) -> EnvironmentFactory:
        if ":" in self.name:
            where, _, name = self.name.rpartition(":")
            return load_function(where, name, "environment")
        if self.name not in _REGISTRY:
            known = ", ".join(sorted(_REGISTRY))
            raise ValueError(
                f"environment: no environment is called {self.name!r}; accepted are {known}, path/to/file.py:Class and "
                "package.module:Class"
            )
        return _REGISTRY[self.name]


class MultiTurnTask(Task, Protocol):
    """A task whose problems are games of several turns; its verifier is that of its environment."""

    environment: EnvironmentSpec

    def worked_policy(self, example: Example) -> Policy:
        """What plays the game of an example well. Raises ValueError where none is known."""
        ...


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
    """A game so far: its state, None before it was reset, the transcript from the first prompt to the last observation,
    and the rewards of all its turns by name."""

    state: State
    messages: tuple[Message, ...]
    rewards: dict[str, float] = field(default_factory=dict)
    turns: int = 0
    done: bool = False
    solved: bool = False


def begin(environment: Environment, example: Example) -> Trajectory:
    """The game of an example before its first turn."""
    return replace(announce(example), state=environment.reset(example))


def announce(example: Example) -> Trajectory:
    """The game of an example before it was reset, which `turn_rollout` leaves to the verifier."""
    return Trajectory(None, example.messages or ({"role": "user", "content": example.prompt or ""},))


def next_prompt(example: Example, trajectory: Trajectory) -> Example:
    """The example with the whole transcript as its prompt: as messages if it is a chat, else as text, in which prompt,
    completions and observations follow one another with nothing between them."""
    if example.messages is not None:
        return replace(example, messages=trajectory.messages)
    return replace(example, prompt="".join(message["content"] for message in trajectory.messages))


def conversation(example: Example, trajectory: Trajectory) -> str:
    """What followed the first prompt, as text: of a chat, each message on a line of its own."""
    opening = len(announce(example).messages)
    between = "" if example.messages is None else "\n"
    return between.join(message["content"] for message in trajectory.messages[opening:])


def advance(environment: Environment, trajectory: Trajectory, completion: str) -> Trajectory:
    """The game one turn on. Raises ValueError for a game that is done."""
    if trajectory.done:
        raise ValueError("environment: the game is done; it takes no further completion")
    turn = _take_turn(environment, trajectory.state, trajectory.turns, completion)
    return after(trajectory, completion, turn)


def after(trajectory: Trajectory, completion: str, turn: Turn) -> Trajectory:
    """The game after a completion and what came of it."""
    return Trajectory(
        state=turn.state,
        messages=(*trajectory.messages, _said(completion), {"role": "user", "content": turn.observation}),
        rewards=trajectory.rewards
        | {name: trajectory.rewards.get(name, 0.0) + reward for name, reward in turn.rewards.items()},
        turns=trajectory.turns + 1,
        done=turn.done,
        solved=turn.solved,
    )


def broken_off(trajectory: Trajectory, completion: str) -> Trajectory:
    """The game after a completion that nothing came of."""
    return replace(trajectory, messages=(*trajectory.messages, _said(completion)), done=True)


def play(environment: Environment, example: Example, policy: Policy) -> Trajectory:
    """A whole game, played by a policy."""
    trajectory = begin(environment, example)
    while not trajectory.done:
        trajectory = advance(environment, trajectory, policy(trajectory.messages))
    return trajectory


def recital(example: Example, texts: Sequence[str]) -> Policy:
    """The policy that plays an example's game by saying these texts one after the other, and the last for ever."""
    opening = len(announce(example).messages)
    return lambda messages: texts[min((len(messages) - opening) // 2, len(texts) - 1)]


def score_of(trajectory: Trajectory) -> Score:
    """The score of a game: the sum of its rewards, these by name, and whether it was solved as the accuracy, 0 or 1."""
    return Score(sum(trajectory.rewards.values()), dict(trajectory.rewards), accuracy=float(trajectory.solved))


def turn_rollout(rollout: Rollout, name: str, trajectory: Trajectory) -> Rollout:
    """A rollout as the verifier `turn` takes it: the next turn of a game begun by `announce`, of the example called
    `name`."""
    where = {"id": name, "row": rollout.info, "state": trajectory.state, "turns": trajectory.turns}
    return replace(rollout, info=where)


def turn_of(score: Score) -> Turn:
    """The turn in the verifier's score. Raises ValueError where there is none in it, or what the environment said is
    no text that a model could read."""
    observation, state, done = (score.notes.get(name) for name in ("observation", "state", "done"))
    if not (isinstance(observation, str) and isinstance(state, str) and isinstance(done, bool)):
        raise ValueError(f"environment: {score.notes!r:.80} is no turn whose observation is text")
    observation.encode()  # raises UnicodeEncodeError, a ValueError, for half of a surrogate pair
    return Turn(state, observation, score.components, done, solved=score.accuracy == 1)


@register("turn")
def turn_verifier(environment: str, options: Mapping[str, Any]) -> Verifier:
    """The verifier of one turn of a game: it resets the game before the first, and takes a step. Its score is the
    turn's, with the state, the observation and whether the game is done in its notes."""
    game = EnvironmentSpec(environment, dict(options)).load()

    def verify(rollout: Rollout) -> Score:
        packed, turns = rollout.info["state"], rollout.info["turns"]
        state = game.reset(_example(rollout)) if packed is None else json.loads(packed)
        turn = _take_turn(game, state, turns, rollout.completion)
        notes = {"state": json.dumps(turn.state), "observation": turn.observation, "done": turn.done}
        return Score(sum(turn.rewards.values()), turn.rewards, float(turn.solved), notes=notes)

    return verify


def _take_turn(environment: Environment, state: State, turns: int, completion: str) -> Turn:
    """What comes of the completion after `turns` turns; the last one that a game may have is done."""
    turn = environment.step(state, completion)
    return replace(turn, done=bool(turn.done or turns + 1 >= environment.max_turns))


def _example(first: Rollout) -> Example:
    """The example that the first turn's rollout is of."""
    prompt = first.prompt if first.messages is None else None
    return Example(first.info["id"], first.answer, first.info["row"], prompt, first.messages)


def _said(completion: str) -> Message:
    return {"role": "assistant", "content": completion}
