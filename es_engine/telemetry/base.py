"""What a run tells those who watch it: generations, evaluations, messages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Protocol, TypedDict

Line = Mapping[str, Any]


class GenerationLine(TypedDict):
    """What is told of a generation, None where there is no such figure (no rollout was scored, or the method has none).

    Counts and times are this generation's unless said otherwise.
    """

    step: int  # 0-based; shown as step + 1
    stage: int  # from 1
    generations: int | None  # the budget, None when it is not counted in generations
    reward_mean: float | None
    reward_best: float | None
    fitness_spread: float | None
    accuracy: float | None  # 0 to 1
    components: Mapping[str, float | None]  # mean of each named part of the reward
    rollouts: int
    tokens: int  # generated
    prompt_tokens: int
    spent: Mapping[str, float]  # by the run's steps so far: generated, processed, flops, worker_seconds
    seconds: float
    seconds_rollouts: float
    seconds_update: float
    times: Mapping[str, float]  # seconds of work by its kind (slots, generate, ...), added over workers
    sigma: float | None
    lr: float
    theta_rms: float
    delta_norm: float  # of DeltaW, over all matrices
    delta_norm_ratio: float  # the same as a fraction of the norm of the matrices
    constant_members: int | None  # members whose rewards were all equal
    learning: Mapping[str, float | None]  # the figures of a gradient method by its own names
    failures: Mapping[str, Mapping[str, int]]  # scores that were not given, by verifier, then by kind
    rescored: int  # rollouts given to a verifier again because its process died
    worker_restarts: int  # since this process began with the run
    eta_seconds: float | None


class EvaluationLine(TypedDict):
    """What is told of an evaluation of the center on held-out problems; other numbers are shown by their own names."""

    step: int  # generations behind the center
    reward: float | None  # mean
    reward_ci95: Sequence[float] | None  # its interval: low, high
    accuracy: float | None  # mean, 0 to 1
    accuracy_ci95: Sequence[float] | None
    pass_at_k: Mapping[str, float]  # by k
    components: Mapping[str, float | None]  # mean of each named part of the reward
    problems: int
    samples: int  # rollouts of each problem
    tokens: int  # generated
    prompt_tokens: int
    seconds: float
    times: Mapping[str, float]  # seconds of work by its kind, added over workers
    failures: Mapping[str, Mapping[str, int]]  # scores that were not given, by verifier, then by kind
    rescored: int  # rollouts given to a verifier again because its process died


class Telemetry(Protocol):
    """A place where the figures of a run go.

    Plotted against generations done: generation `step` is at step + 1, next to the evaluation that follows it.
    """

    def generation(self, line: Line) -> None:
        """A generation has ended; the line has at least the keys of GenerationLine."""
        ...

    def evaluation(self, line: Line) -> None:
        """The center was evaluated; the line has at least the keys of EvaluationLine."""
        ...

    def message(self, text: str) -> None:
        """Something a person watching should read, one line."""
        ...

    def close(self, error: BaseException | None = None) -> None:
        """The run has ended, or is left because of an error, which is raised elsewhere."""
        ...


class Broadcast:
    """Tells several places the same."""

    def __init__(self, places: Sequence[Telemetry]) -> None:
        self.places = places

    def generation(self, line: Line) -> None:
        _check(line, GenerationLine.__required_keys__)
        for place in self.places:
            place.generation(line)

    def evaluation(self, line: Line) -> None:
        _check(line, EvaluationLine.__required_keys__)
        for place in self.places:
            place.evaluation(line)

    def message(self, text: str) -> None:
        for place in self.places:
            place.message(text)

    def close(self, error: BaseException | None = None) -> None:
        with ExitStack() as each:  # closes the others too where one raises
            for place in self.places:
                each.callback(place.close, error)

    def __enter__(self) -> Broadcast:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(error)


def _check(line: Line, keys: frozenset[str]) -> None:
    missing = keys - line.keys()
    assert not missing, f"a line of telemetry lacks {', '.join(sorted(missing))}"


def numbers(line: Line) -> Iterator[tuple[str, float]]:
    """The numbers of a line but its step, by name; a mapping's own names come after its name and a slash."""
    for name, value in line.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{inner}", number) for inner, number in numbers(value))
        elif isinstance(value, int | float) and not isinstance(value, bool) and name != "step":
            yield name, value
