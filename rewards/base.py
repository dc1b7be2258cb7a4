"""What a problem, an answer to it and the answer's score are; how a verifier is named and found."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any, Final, Literal, Protocol, SupportsFloat, TypeGuard, TypeVar, get_args

ENTRY_POINTS = "es_engine.verifiers"
"""The group of entry points under which a package ships verifiers."""

Split = Literal["train", "heldout"]
Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Example:
    """One problem of a task. Either `prompt` (plain text) or `messages` (a chat) is set, never both. `hidden` stands
    for what else makes it the problem that it is: of a game, a hash of how it begins."""

    id: str
    answer: str
    info: dict[str, Any]
    prompt: str | None = None
    messages: tuple[Message, ...] | None = None
    hidden: str = ""

    @property
    def problem(self) -> Hashable:
        """What two examples share exactly where they are the same problem, whatever they are called."""
        messages = tuple(tuple(sorted(message.items())) for message in self.messages or ())
        return self.prompt, messages, self.answer, self.hidden


@dataclass(frozen=True, slots=True)
class Rollout:
    """A prompt and what the model made of it; what a verifier sees. `info` is the whole data row.

    `prompt` is as the model read it; `messages` are the same as a chat, None where the task gives plain text.
    `finish_reason` is "stop", "length" (max_tokens) or "repetition" (max_repeats).
    """

    prompt: str
    completion: str
    answer: str
    info: Mapping[str, Any]
    messages: tuple[Message, ...] | None = None
    token_ids: tuple[int, ...] = ()
    finish_reason: str = "stop"

    @property
    def completion_messages(self) -> tuple[Message, ...]:
        """The completion as a chat: one message of the assistant."""
        return ({"role": "assistant", "content": self.completion},)


@dataclass(frozen=True, slots=True)
class Score:
    """A verifier's verdict.

    `value` is the reward, None when there is no score; `components` are its named parts; `accuracy` (0 to 1) is
    exact correctness, apart from any shaping; `error` says why there is no score. `notes` are what else the verifier
    has to say, as JSON can write it; they are kept with the sample. `missing` are the parts of a sum that gave none.
    """

    value: float | None
    components: dict[str, float] = field(default_factory=dict)
    accuracy: float | None = None
    error: str | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    missing: tuple[str, ...] = ()


NO_SCORE: Final = "no score"
"""Among failures, what a rollout counts as that the verifier itself gave no score: that is not its failure."""


DIALECTS = {
    "trl": "rewards.dialects.trl",
    "verl": "rewards.dialects.verl",
    "openrlhf": "rewards.dialects.openrlhf",
    "verifiers": "rewards.dialects.verifiers",
    "rg": "rewards.reasoning_gym",
}
"""The module of each dialect by its prefix; imported by the process that needs it only."""


class InvalidScore(Score):
    """In place of a verdict that is no score."""


Verdict = Score | float | None
Takes = Literal["rollout", "batch", "group"]
Verifier = Callable[[Rollout], Verdict | Awaitable[Verdict]] | Callable[[list[Rollout]], Any]
"""A function, async or not, of a rollout; or of a list of rollouts, one verdict each, if the decorator `verifier` says
so."""
VerifierFactory = Callable[..., Verifier]
_V = TypeVar("_V", bound=Callable[..., Any])


class Task(Protocol):
    """Problems and how what a model makes of them is scored. Both splits are random-access streams, disjoint from each
    other. Of training problems from files, whose prompts may be of any length, there are so many `rows` before they
    come again; None where problems are made, or all about as long."""

    rows: int | None
    max_tokens: int
    stop: tuple[str, ...]
    verifier: VerifierSpec

    def example(self, split: Split, index: int) -> Example:
        """Problem number `index` (from 0) of a split; a pure function of its arguments."""
        ...


class SingleTurnTask(Task, Protocol):
    """A task whose problems are answered with one completion, which the verifier sees."""

    def worked_solution(self, example: Example) -> str:
        """A completion that is right. Raises ValueError where none is known."""
        ...


@dataclass(frozen=True, slots=True)
class VerifierSpec:
    """A verifier by name, so that it can cross a process boundary as plain data.

    `name` is a registered verifier, one that an installed package ships (entry point of the group
    `es_engine.verifiers`), `path/to/file.py:function`, `package.module:function`, or a reward in another trainer's form
    behind the prefix of its dialect (see `rewards.dialects`); `options` are keyword arguments of a registered
    verifier's factory or of the dialect (a user's own function takes none).
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def load(self) -> Verifier:
        """Find the verifier. Raises ValueError, naming the file or function, where there is none."""
        if ":" not in self.name:
            return _by_name(self.name)(**self.options)
        if self.name.partition(":")[0] in DIALECTS:
            from rewards import dialects  # it imports this module

            return dialects.load(self.name, self.options)
        if self.options:
            raise ValueError(f"verifier: {self.name} takes no options; leave out {', '.join(self.options)}")
        where, _, function = self.name.rpartition(":")
        return load_function(where, function)


def verifier(name: str | None = None, *, takes: Takes = "rollout") -> Callable[[_V], _V]:
    """Decorator: make a verifier known under a name, and say what it takes.

    `rollout`: one rollout. `batch`: a list of any rollouts, for verifiers that are cheaper for many at once. `group`:
    a list of all completions of one prompt by one member. Of a list, the verdicts are a list as long.
    """
    if takes not in get_args(Takes):
        raise ValueError(f"verifier: takes is {takes!r}; accepted are {', '.join(get_args(Takes))}")

    def add(function: _V) -> _V:
        function.takes = takes  # type: ignore[attr-defined]
        if name is not None:
            register(name)(lambda: function)
        return function

    return add


def takes(verifier: Verifier) -> Takes:
    """What a verifier is called with."""
    return getattr(verifier, "takes", "rollout")


@dataclass(slots=True)
class Parts:
    """The names of the parts that a verifier is made of; it calls `tell` with a part's place before it asks it."""

    names: tuple[str, ...] = ()
    tell: Callable[[int], None] = lambda place: None


def parts(verifier: Verifier) -> Parts:
    """What a verifier is made of: nothing, unless it is a sum."""
    found = getattr(verifier, "parts", None)
    return found if isinstance(found, Parts) else Parts()


def judge_now(
    verifier: Verifier, rollouts: Sequence[Rollout], run: Callable[[Coroutine[Any, Any, Any]], Any]
) -> list[Score]:
    """The scores of rollouts, by a verifier of any kind. `run` starts an event loop, but only for what is asynchronous:
    it costs more than a quick verifier, and a verifier may start one of its own. Raises what the verifier raises, and
    TypeError where it does not answer a list of rollouts with as many verdicts."""
    answers = [run(settled(each)) if inspect.isawaitable(each) else each for each in ask(verifier, rollouts)]
    return as_scores(answers, verifier, rollouts)


def ask(verifier: Any, rollouts: Sequence[Rollout]) -> list[Any]:
    """What the verifier answers each call that it takes to ask it of all rollouts; some may be awaitable."""
    return [verifier(each) for each in rollouts] if takes(verifier) == "rollout" else [verifier(list(rollouts))]


async def settled(answer: Any) -> Any:
    """The answer itself, awaited where it must be."""
    return await answer if inspect.isawaitable(answer) else answer


def as_scores(answers: list[Any], verifier: Verifier, rollouts: Sequence[Rollout]) -> list[Score]:
    """The scores in what a verifier answered. Raises TypeError where they are not as many as the rollouts."""
    verdicts = answers if takes(verifier) == "rollout" else answers[0]
    if not isinstance(verdicts, Sequence) or len(verdicts) != len(rollouts):
        raise TypeError(f"it answered {len(rollouts)} rollouts with {verdicts!r:.60}, not with a list as long")
    return [as_score(verdict) for verdict in verdicts]


def register(name: str) -> Callable[[VerifierFactory], VerifierFactory]:
    """Decorator: make a factory of verifiers known under a name."""

    def add(factory: VerifierFactory) -> VerifierFactory:
        if name in _REGISTRY:
            raise ValueError(f"verifier: the name {name!r} is taken")
        _REGISTRY[name] = factory
        return factory

    return add


_REGISTRY: dict[str, VerifierFactory] = {}


def as_score(verdict: object) -> Score:
    """Make a Score of what a verifier returned: a Score, a number, of NumPy and torch too, or None; anything else is an
    InvalidScore."""
    if verdict is None:
        return Score(None)
    if isinstance(verdict, Score):
        return verdict if verdict.value is None or _is_finite(_plain(verdict.value)) else _no_score(verdict.value)
    number = _plain(verdict)
    return Score(float(number)) if _is_finite(number) else _no_score(verdict)


def _plain(value: Any) -> Any:
    """A number of NumPy or torch as Python's; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _is_finite(value: object) -> TypeGuard[SupportsFloat]:
    """Whether something is a real number that a float can hold."""
    try:
        return isinstance(value, Real) and math.isfinite(value)
    except OverflowError:  # a whole number that is too large
        return False


def _no_score(value: object) -> InvalidScore:
    what = str(float(value)) if isinstance(value, float) else type(value).__name__
    return InvalidScore(None, error=f"the verifier returned {what}, not a Score, a finite number or None")


def _by_name(name: str) -> VerifierFactory:
    """The factory of a registered verifier, or of one that an installed package ships."""
    if name in _REGISTRY:
        return _REGISTRY[name]
    import importlib.metadata  # a scoring process starts quicker without

    shipped = importlib.metadata.entry_points(group=ENTRY_POINTS)
    if name not in shipped.names:
        known = ", ".join(sorted({*_REGISTRY, *shipped.names}))
        raise ValueError(
            f"verifier: no verifier is called {name!r}; accepted are {known}, "
            "path/to/file.py:function and package.module:function"
        )
    function = shipped[name].load()
    return _REGISTRY.get(name, lambda: function)  # a decorator of its own may have registered it


def load_function(where: str, function: str, what: str = "verifier") -> Callable[..., Any]:
    """A function, or a class, of a file (`where` ends in .py) or of a module. Raises ValueError, which begins with
    `what` it was to be, where there is none."""
    found = getattr(load_module(where, what), function, None)
    if not callable(found):
        raise ValueError(f"{what}: {where} has no function {function!r}")
    return found


def load_module(where: str, what: str = "verifier") -> ModuleType:
    """The module of a file (`where` ends in .py) or of a dotted name. Raises ValueError where there is none."""
    return _module_from_file(Path(where), what) if where.endswith(".py") else _module_by_name(where, what)


_LOADING = threading.RLock()  # a file may load another


def _module_from_file(path: Path, what: str) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"{what}: no file {path}")
    path = path.resolve()
    name = f"verifier_{path.stem}_{hashlib.blake2b(str(path).encode(), digest_size=8).hexdigest()}"
    with _LOADING:  # another thread must not find the module half loaded
        if name not in sys.modules:  # dataclasses and pickle look their module up there
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None
            assert spec.loader is not None
            sys.modules[name] = importlib.util.module_from_spec(spec)
            try:
                spec.loader.exec_module(sys.modules[name])
            except BaseException:
                del sys.modules[name]
                raise
        return sys.modules[name]


def _module_by_name(name: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{what}: {name!r} cannot be imported ({error})") from error
