"""What a problem, an answer to it and the answer's score are; how a verifier is named and found."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol, SupportsFloat, TypeGuard

Split = Literal["train", "heldout"]
Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Example:
    """One problem of a task. Either `prompt` (plain text) or `messages` (a chat) is set, never both."""

    id: str
    answer: str
    info: dict[str, Any]
    prompt: str | None = None
    messages: tuple[Message, ...] | None = None


@dataclass(frozen=True, slots=True)
class Rollout:
    """A prompt and what the model made of it; what a verifier sees. `info` is the whole data row."""

    prompt: str
    completion: str
    answer: str
    info: Mapping[str, Any]
    messages: tuple[Message, ...] | None = None
    token_ids: tuple[int, ...] = ()
    finish_reason: str = "stop"


@dataclass(frozen=True, slots=True)
class Score:
    """A verifier's verdict.

    `value` is the reward, None when there is no score; `components` are its named parts; `accuracy` (0 to 1) is
    exact correctness, apart from any shaping; `error` says why there is no score.
    """

    value: float | None
    components: dict[str, float] = field(default_factory=dict)
    accuracy: float | None = None
    error: str | None = None


DIALECTS = {
    "trl": "rewards.dialects.trl",
    "verl": "rewards.dialects.verl",
    "openrlhf": "rewards.dialects.openrlhf",
    "verifiers": "rewards.dialects.verifiers",
    "rg": "rewards.reasoning_gym",
}
"""The module of each dialect by its prefix; imported by the process that needs it only."""

Verifier = Callable[[Rollout], Score | float | None]
VerifierFactory = Callable[..., Verifier]


class Task(Protocol):
    """Problems and how they are scored. Both splits are random-access streams, disjoint from each other."""

    max_tokens: int
    stop: tuple[str, ...]
    verifier: VerifierSpec

    def example(self, split: Split, index: int) -> Example:
        """Problem number `index` (from 0) of a split; a pure function of its arguments."""
        ...


@dataclass(frozen=True, slots=True)
class VerifierSpec:
    """A verifier by name, so that it can cross a process boundary as plain data.

    `name` is a registered verifier, `path/to/file.py:function`, `package.module:function`, or a reward in another
    trainer's form behind the prefix of its dialect (see `rewards.dialects`); `options` are keyword arguments of the
    registered verifier's factory or of the dialect (a user's own function takes none).
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def load(self) -> Verifier:
        """Find the verifier. Raises ValueError, naming the file or function, where there is none."""
        if ":" not in self.name:
            if self.name not in _REGISTRY:
                known = ", ".join(sorted(_REGISTRY))
                raise ValueError(
                    f"verifier: no verifier is called {self.name!r}; accepted are {known}, "
                    "path/to/file.py:function and package.module:function"
                )
            return _REGISTRY[self.name](**self.options)
        if self.name.partition(":")[0] in DIALECTS:
            from rewards import dialects  # it imports this module

            return dialects.load(self.name, self.options)
        where, _, function = self.name.rpartition(":")
        return load_function(where, function)


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
    """Make a Score of what a verifier returned: a Score, a number or None; anything else is an error score."""
    if verdict is None:
        return Score(None)
    if isinstance(verdict, Score):
        return verdict if verdict.value is None or _is_finite(verdict.value) else _no_score(verdict.value)
    return Score(float(verdict)) if _is_finite(verdict) else _no_score(verdict)


def _is_finite(value: object) -> TypeGuard[SupportsFloat]:
    if not isinstance(value, Real):
        return False
    # Compared, not converted: a whole number too large for a float is not finite here, and raises in math.isfinite.
    magnitude: Any = abs(value)
    return bool(magnitude <= sys.float_info.max)


def _no_score(value: object) -> Score:
    what = str(float(value)) if isinstance(value, float) else type(value).__name__
    return Score(None, error=f"the verifier returned {what}, not a Score, a finite number or None")


def load_function(where: str, function: str) -> Callable[..., Any]:
    """A function of a file (`where` ends in .py) or of a module. Raises ValueError where there is none."""
    found = getattr(load_module(where), function, None)
    if not callable(found):
        raise ValueError(f"verifier: {where} has no function {function!r}")
    return found


def load_module(where: str) -> ModuleType:
    """The module of a file (`where` ends in .py) or of a dotted name. Raises ValueError where there is none."""
    return _module_from_file(Path(where)) if where.endswith(".py") else _module_by_name(where)


def _module_from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"verifier: no file {path}")
    spec = importlib.util.spec_from_file_location(f"verifier_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look their module up there
    spec.loader.exec_module(module)
    return module


def _module_by_name(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"verifier: {name!r} cannot be imported ({error})") from error
