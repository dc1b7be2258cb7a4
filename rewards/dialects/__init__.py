"""Rewards that were written for other trainers, run as they are. The prefix of a verifier's name says for which:

    trl:accuracy_reward                                    one of trl.rewards
    trl:get_repetition_penalty_reward(ngram_size=3)        what a factory returns; a class is one too
    trl:path/to/file.py:function                           or package.module:function, here and below
    verl:path/to/file.py:compute_score                     one answer or a batch a call; `verl:path/to/file.py` will do
    openrlhf:path/to/file.py                               its reward_func
    verifiers:package.module                               the rubric of its load_environment()
    verifiers:package.module:function                      one function of a rubric; also a Task of verifiers 0.4
    rg:chain_sum                                           a reasoning-gym data set scores its own entries

A module for each dialect turns a `Reference` into a `BatchVerifier`; it and the other trainer's package are imported
by the process that scores. None and NaN mean here, too, that there is no score.
"""

from __future__ import annotations

import ast
import asyncio
import importlib
import inspect
import math
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from rewards.base import DIALECTS, Message, Rollout, Score, Verifier, as_score, takes

BatchVerifier = Callable[[Sequence[Rollout]], list[Score] | Awaitable[list[Score]]]
"""The scores of n rollouts, in their order; awaitable where the reward is asynchronous."""

_T = TypeVar("_T")
_REFERENCE = re.compile(r"(?P<where>.+?)(:(?P<function>\w+))?(?P<call>\(.*\))?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Reference:
    """What follows a dialect's prefix: `where`, `where:function`, either with `(name=value, ...)` behind it.

    `name` is the whole, for messages; `arguments` is None where no parentheses and no options are given.
    """

    name: str
    where: str
    function: str | None
    arguments: dict[str, Any] | None

    def call(self, factory: Callable[..., Any]) -> Any:
        """What the factory makes of the arguments. Raises ValueError where it does not take them."""
        arguments = self.arguments or {}
        try:
            inspect.signature(factory).bind(**arguments)
        except TypeError as error:
            raise ValueError(f"verifier: {self.name} cannot be called with the arguments given ({error})") from None
        return factory(**arguments)

    def refuse_arguments(self) -> None:
        """Raises ValueError where there are arguments."""
        if self.arguments is not None:
            raise ValueError(f"verifier: {self.name} takes no arguments; leave them out")


class Dialect(Protocol):
    """A module of `DIALECTS`."""

    def load(self, reference: Reference) -> BatchVerifier:
        """The verifier of a reward, made by `verifier(takes="group")` where it may compare the answers to a prompt.
        Raises ValueError where there is none."""
        ...


def load(name: str, options: Mapping[str, Any]) -> Verifier:
    """The verifier of a reward: of a group where it compares the answers to a prompt. Raises what `load_batch`
    raises."""
    score_batch = load_batch(name, options)
    if takes(score_batch) == "group":
        return score_batch

    def verify(rollout: Rollout) -> Any:
        return then(score_batch([rollout]), lambda scores: scores[0])

    return verify


def load_batch(name: str, options: Mapping[str, Any]) -> BatchVerifier:
    """The verifier of a list of rollouts, which a reward that compares answers sees together.

    `options` are further arguments of the call. Raises ValueError, in one sentence, where a file, a function or a
    package is missing or the arguments do not fit.
    """
    prefix, _, rest = name.partition(":")
    dialect: Dialect = importlib.import_module(DIALECTS[prefix])
    reference = _parse(name, rest, options)
    try:
        return dialect.load(reference)
    except ModuleNotFoundError as error:
        raise missing_package(f"verifier: {name}", error) from error


def missing_package(what: str, error: ModuleNotFoundError) -> ValueError:
    """The sentence that says how to install what `what` needs."""
    package = str(error.name).partition(".")[0].replace("_", "-")
    return ValueError(f"{what} needs the package {package}, which is not installed; pip install {package}")


def _parse(name: str, rest: str, options: Mapping[str, Any]) -> Reference:
    match = _REFERENCE.fullmatch(rest)
    if match is None:
        raise ValueError(
            f"verifier: {name!r} says nothing behind the prefix; accepted is such as {name}file.py:function"
        )
    call = match["call"]
    arguments = {**options, **_arguments(call, name)} if call or options else None
    return Reference(name, match["where"], match["function"], arguments)


def _arguments(call: str | None, name: str) -> dict[str, Any]:
    """The arguments in `(name=value, ...)`; values are literals of Python."""
    try:
        node = ast.parse(f"f{call or '()'}", mode="eval").body
        if not isinstance(node, ast.Call) or node.args:
            raise ValueError("an argument has no name")
        return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords}
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"verifier: {name}: accepted in parentheses are name=value with plain values") from error


def then(value: Any, use: Callable[[Any], _T]) -> _T | Awaitable[_T]:
    """`use(value)`, at once or, where the value is awaitable, when it is there.

    A reward that is not asynchronous is thereby called outside any event loop, and may start one of its own.
    """
    return _later(value, use) if inspect.isawaitable(value) else use(value)


async def _later(value: Awaitable[Any], use: Callable[[Any], _T]) -> _T:
    return use(await value)


def together(values: list[Any]) -> Any:
    """The values, or something to await for all of them where any is awaitable."""
    return _gathered(values) if any(map(inspect.isawaitable, values)) else values


async def _gathered(values: list[Any]) -> list[Any]:
    return await asyncio.gather(*map(_settled, values))


async def _settled(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


def scores(rewards: Any, rollouts: Sequence[Rollout], name: str) -> list[Score]:
    """The scores of a list, array or tensor of numbers, one for each rollout. Raises ValueError for another length."""
    rewards = rewards.tolist() if hasattr(rewards, "tolist") else rewards
    if not isinstance(rewards, Sequence) or len(rewards) != len(rollouts):
        what = f"{len(rewards)} rewards" if isinstance(rewards, Sequence) else type(rewards).__name__
        raise ValueError(f"{name} returned {what} for {len(rollouts)} completions; accepted is a list of one for each")
    return [score(reward) for reward in rewards]


def score(reward: Any, parts: Mapping[str, Any] | None = None, accuracy: Any = None) -> Score:
    """The score of a reward, NaN or None for none; those of the parts that are finite numbers are its components."""
    value = plain(reward)
    made = as_score(None if isinstance(value, float) and math.isnan(value) else value)
    return replace(made, components=numbers(parts or {}), accuracy=as_score(plain(accuracy)).value)


def numbers(parts: Mapping[str, Any]) -> dict[str, float]:
    """The parts that are finite numbers."""
    values = {str(name): as_score(plain(part)).value for name, part in parts.items()}
    return {name: value for name, value in values.items() if value is not None}


def plain(number: Any) -> Any:
    """A number of numpy or torch as one of Python."""
    return number.item() if hasattr(number, "item") else number


def chat(rollout: Rollout) -> tuple[list[Message], list[Message]]:
    """The messages of the prompt and of the completion."""
    prompt = rollout.messages or ({"role": "user", "content": rollout.prompt},)
    return [dict(message) for message in prompt], [{"role": "assistant", "content": rollout.completion}]


def as_asked(rollout: Rollout) -> tuple[list[Message] | str, list[Message] | str]:
    """Prompt and completion: messages where the prompt was a chat, else text."""
    return (rollout.prompt, rollout.completion) if rollout.messages is None else chat(rollout)
