"""A game of several turns: guess a secret number, told after each guess whether the secret is higher or lower."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from rewards.base import Example, Message, Split
from rewards.environments import EnvironmentSpec, Policy, State, Turn, register_environment
from rewards.problems import DrawnProblems, Row, below
from rewards.weights import checked_weights

Template = Literal["plain", "chat"]
Verdict = Literal["higher", "lower", "right", "unreadable"]

WEIGHTS = {"format": 0.1, "narrowed": 0.3, "solved": 0.6}
# Every character of a `plain` prompt, guess and observation.
PLAIN_ALPHABET = "\n -0123456789:<=>?"

_MAX_TOKENS: dict[Template, int] = {"plain": 12, "chat": 16}
_VERDICTS: dict[Template, dict[Verdict, str]] = {
    "plain": {"higher": "\n>", "lower": "\n<", "right": "\n=", "unreadable": "\n?"},
    "chat": {
        "higher": "Higher.",
        "lower": "Lower.",
        "right": "Right.",
        "unreadable": "That is not one whole number.",
    },
}
_NUMBER = re.compile(r"[0-9]{1,9}")


class Guess:
    """The guessing task: secret numbers from a seeded generator. Which secret of which range is hashed into a split.

    Args:
        low, high: the least and the greatest number of any game.
        span: how many numbers a game's range has; the range lies anywhere between `low` and `high`.
        turns: how many guesses a game has; left out, the fewest with which halving the range always finds the secret.
        template: `plain` (for a character tokenizer) or `chat`.
        seed: of the problems' choice and order. It does not move a problem from one split to the other.
        max_tokens, stop: for the generation of one guess; left out, what suits the template.
        weights: of the reward's components (see `GuessGame`).

    Raises ValueError, naming the field, for values that give no problems.
    """

    def __init__(
        self,
        *,
        low: int = 1,
        high: int = 1000,
        span: int = 100,
        turns: int | None = None,
        template: Template = "chat",
        seed: int = 0,
        max_tokens: int | None = None,
        stop: Sequence[str] | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        _check(low, high, span, turns)
        self._turns = halvings(span) if turns is None else turns
        options = {"turns": self._turns, "template": template, "weights": checked_weights(weights, WEIGHTS)}
        self.environment = EnvironmentSpec("guess", options)
        self.environment.load()
        self.verifier = self.environment.verifier
        self.max_tokens = _MAX_TOKENS[template] if max_tokens is None else max_tokens
        self.stop = (("\n",) if template == "plain" else ()) if stop is None else tuple(stop)
        self._template = template
        self._problems = _generated(low, high, span, seed)
        self.rows: int | None = None
        for split in get_args(Split):
            self.example(split, 0)  # settings that allow no problem are refused here, not in the middle of a run

    def example(self, split: Split, index: int) -> Example:
        """Problem number `index` (from 0) of a split; a pure function of its arguments.

        The answer is the secret, and `info` the row: `low` and `high`, the ends of the range, and `secret`.
        """
        row = self._problems.row(split, index)
        low, high, answer = row["low"], row["high"], str(row["secret"])
        if self._template == "plain":
            return Example(problem_key(row), answer, row, prompt=f"{low}-{high} {self._turns}:")
        content = (
            f"I am thinking of a whole number from {low} to {high}. Find it in at most {self._turns} guesses: after "
            "each I say whether my number is higher or lower. Reply with one number and nothing else."
        )
        return Example(problem_key(row), answer, row, messages=({"role": "user", "content": content},))

    def worked_policy(self, example: Example) -> Policy:
        """What finds the secret within the guesses there are: halving. Raises ValueError where these are too few for
        it, since then none is known for every secret."""
        low, high = example.info["low"], example.info["high"]
        needed = halvings(high - low + 1)
        if self._turns < needed:
            raise ValueError(f"task: to find any number from {low} to {high} takes {needed} guesses, not {self._turns}")
        return halving(low, high, self._template)


@register_environment("guess")
class GuessGame:
    """The game of `Guess`. A completion is a guess where it is one whole number in up to 9 ASCII digits, with nothing
    around it but white space; any other costs the turn. A guess outside the range is a guess.

    The reward is the sum of three components, each its weight times:

    format: the share of the turns that were guesses; those that were not needed count as such.
    narrowed: how far the range that is left has been narrowed down, 1 for a single number, on a logarithmic scale: each
        halving adds as much.
    solved: 1 if the secret was guessed.

    The weights default to `WEIGHTS`. Raises ValueError, naming the field, for what is no option.
    """

    def __init__(self, turns: int = 7, template: Template = "chat", weights: Mapping[str, float] | None = None) -> None:
        if template not in get_args(Template):
            raise ValueError(f"task.template: {template!r} is not one of {', '.join(get_args(Template))}")
        self.max_turns = turns
        self._verdicts, self._template = _VERDICTS[template], template
        self._weights = checked_weights(weights, WEIGHTS)

    def reset(self, example: Example) -> State:
        """`low` and `high` are the ends of the range that is left, `span` is how many numbers it had at first."""
        low, high = example.info["low"], example.info["high"]
        return {"secret": example.info["secret"], "low": low, "high": high, "span": high - low + 1, "turns": 0}

    def step(self, state: State, completion: str) -> Turn:
        secret, low, high, turns = state["secret"], state["low"], state["high"], state["turns"] + 1
        guess = _read(completion)
        verdict = _verdict(guess, secret)
        if guess is not None:
            low, high = _left(low, high, guess, verdict)
        after = {**state, "low": low, "high": high, "turns": turns}
        left = self.max_turns - turns
        solved = verdict == "right"
        grades = {
            "format": (float(guess is not None) + left * solved) / self.max_turns,
            "narrowed": math.log(_size(state) / _size(after)) / math.log(state["span"]),
            "solved": float(solved),
        }
        rewards = {name: self._weights[name] * grade for name, grade in grades.items()}
        return Turn(after, self._observation(verdict, left, secret), rewards, solved or left <= 0, solved)

    def _observation(self, verdict: Verdict, left: int, secret: int) -> str:
        said = self._verdicts[verdict]
        if verdict == "right":
            return said
        if self._template == "plain":
            return f"{said} {left}:"
        return f"{said} Guesses left: {left}." if left else f"{said} No guess is left; my number was {secret}."


def halvings(span: int) -> int:
    """How many guesses it takes at most to find one of `span` numbers by guessing the middle of those left."""
    return span.bit_length()


def halving(low: int, high: int, template: Template) -> Policy:
    """The policy that guesses the middle of what the transcript leaves of the range."""
    verdicts = _VERDICTS[template]

    def guess(messages: Sequence[Message]) -> str:
        least, most = low, high
        for said, observed in zip(messages[1::2], messages[2::2], strict=True):
            for verdict in ("higher", "lower"):
                if observed["content"].startswith(verdicts[verdict]):
                    least, most = _left(least, most, int(said["content"]), verdict)
        return str((least + most) // 2)

    return guess


def problem_key(row: Row) -> str:
    """The secret and its range, such as `401-500=437`."""
    return f"{row['low']}-{row['high']}={row['secret']}"


def _generated(low: int, high: int, span: int, seed: int) -> DrawnProblems:
    def draw(numbers: random.Random) -> Row:
        least = low + below(numbers, high - low + 2 - span)
        return {"low": least, "high": least + span - 1, "secret": least + below(numbers, span)}

    return DrawnProblems(draw, problem_key, seed, f"low={low}, high={high}, span={span}")


def _read(completion: str) -> int | None:
    text = completion.strip()
    return int(text) if _NUMBER.fullmatch(text) else None


def _verdict(guess: int | None, secret: int) -> Verdict:
    if guess is None:
        return "unreadable"
    return "right" if guess == secret else "higher" if secret > guess else "lower"


def _left(low: int, high: int, guess: int, verdict: Verdict) -> tuple[int, int]:
    """The ends of the range after a guess."""
    match verdict:
        case "higher":
            return max(low, guess + 1), high
        case "lower":
            return low, min(high, guess - 1)
        case _:
            return guess, guess


def _size(state: State) -> int:
    return int(state["high"] - state["low"] + 1)


def _check(low: int, high: int, span: int, turns: int | None) -> None:
    if not 0 <= low < high < 10**9:
        raise ValueError(f"task.low: {low} to {high} (task.high) is no range within 0 to 999999999")
    if not 2 <= span <= high - low + 1:
        raise ValueError(f"task.span: {span} is not from 2 to {high - low + 1}, all the numbers from {low} to {high}")
    if turns is not None and turns < 1:
        raise ValueError(f"task.turns: {turns} is not a whole number of at least 1")
