"""A reward made of several: the weighted sum of what verifiers say, each clipped and gated."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rewards.base import (
    InvalidScore,
    Parts,
    Rollout,
    Score,
    Takes,
    Verifier,
    VerifierSpec,
    as_score,
    as_scores,
    ask,
    register,
    settled,
    takes,
    verifier,
)

ACCURACY = "accuracy"
_T = TypeVar("_T")
_WIDEST: tuple[Takes, ...] = ("rollout", "batch", "group")


@dataclass(frozen=True, slots=True)
class Part:
    """One term of a sum: `weight` times what `verifier` says, clipped first.

    `of` is which of its numbers: None its value, `accuracy`, or one of its components. Where `gate` names another part,
    this one counts only where that part's own number, before clip and weight, is above 0.
    """

    name: str
    verifier: str
    options: Mapping[str, Any] = field(default_factory=dict)
    of: str | None = None
    weight: float = 1.0
    clip: tuple[float, float] | None = None
    gate: str | None = None


@register("sum")
def sum_verifier(parts: Sequence[Mapping[str, Any]]) -> Verifier:
    """The sum of parts, each the keyword arguments of a `Part`.

    The score's components are the parts by name, weighted, so that they sum to its value; its accuracy is that of the
    first part whose verifier has one, its notes those of the parts. A part whose number is None is `missing` and counts
    nothing; if all are, there is no score. A part with an error leaves the rollout without a score. Verifiers that
    several parts name are asked once, in the name of the first of them. Raises ValueError for two parts of a name, for
    a gate that is no part, and for a verifier that does not exist.
    """
    wanted = [Part(**part) for part in parts]
    _check(wanted)
    asked = [VerifierSpec(part.verifier, dict(part.options)) for part in wanted]
    specs = [spec for place, spec in enumerate(asked) if spec not in asked[:place]]
    loaded = [spec.load() for spec in specs]
    column_of = {part.name: specs.index(spec) for part, spec in zip(wanted, asked, strict=True)}
    widest = max(map(takes, loaded), key=_WIDEST.index)
    firsts = [asked.index(spec) for spec in specs]
    mine = Parts(tuple(part.name for part in wanted))

    def columnwise(items: Sequence[_T]) -> Iterator[tuple[_T, Verifier]]:
        """Each item with the verifier that it is for, which is at work from then on."""
        for item, each, place in zip(items, loaded, firsts, strict=True):
            mine.tell(place)
            yield item, each

    def together(rollouts: list[Rollout]) -> Any:
        answers = [ask(each, rollouts) for _, each in columnwise(loaded)]

        def combine(answers: list[list[Any]]) -> list[Score]:
            columns = [as_scores(answer, each, rollouts) for answer, each in columnwise(answers)]
            return [
                _sum(wanted, {name: columns[column][row] for name, column in column_of.items()})
                for row in range(len(rollouts))
            ]

        # Verifiers that are not asynchronous run outside of any event loop, and may start one of their own.
        if any(inspect.isawaitable(each) for answer in answers for each in answer):
            return later(answers, combine)
        return combine(answers)

    async def later(answers: list[list[Any]], combine: Callable[[list[list[Any]]], list[Score]]) -> list[Score]:
        return combine([[await settled(each) for each in answer] for answer, _ in columnwise(answers)])

    def alone(rollout: Rollout) -> Any:
        scores = together([rollout])
        return _first(scores) if inspect.isawaitable(scores) else scores[0]

    function: Any = alone if widest == "rollout" else together
    function.parts = mine
    return verifier(takes=widest)(function)


async def _first(scores: Awaitable[list[Score]]) -> Score:
    return (await scores)[0]


def without_gpu(spec: VerifierSpec) -> VerifierSpec:
    """The same verifier with its reward models on the CPU, to be tried where there is no GPU."""

    def placed(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
        return {**options, "device": "cpu"} if name == "reward_model" else dict(options)

    if spec.name != "sum":
        return VerifierSpec(spec.name, placed(spec.name, spec.options))
    parts = [{**part, "options": placed(part["verifier"], part["options"])} for part in spec.options["parts"]]
    return VerifierSpec(spec.name, {**spec.options, "parts": parts})


def verifier_names(spec: VerifierSpec) -> list[str]:
    """The names of the verifiers that one asks: those of a sum's parts, or its own."""
    return [part["verifier"] for part in spec.options["parts"]] if spec.name == "sum" else [spec.name]


@register("length")
def length_verifier(free: int, most: int) -> Verifier:
    """A penalty on long completions: 0 up to `free` tokens, -1 from `most` on, a straight line between them (DAPO,
    arXiv 2503.14476, eq. 13)."""
    if not 0 <= free < most:
        raise ValueError(f"verifier: length has free={free} and most={most}; accepted are 0 <= free < most")

    def verify(rollout: Rollout) -> float:
        if rollout.completion and not rollout.token_ids:
            raise ValueError("length: the completion has no token_ids to count")
        return -min(1.0, max(0.0, (len(rollout.token_ids) - free) / (most - free)))

    return verify


def _check(parts: Sequence[Part]) -> None:
    names = [part.name for part in parts]
    if not parts:
        raise ValueError("reward: it has no parts; give it one or more")
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"reward: {names.count(name)} parts are called {name!r}; give each a name of its own")
    for part in parts:
        if part.gate is not None and (part.gate not in names or part.gate == part.name):
            raise ValueError(f"reward: the gate of {part.name!r} is {part.gate!r}, which is no other part")
        if part.clip is not None and not part.clip[0] <= part.clip[1]:
            raise ValueError(f"reward: the clip of {part.name!r} is {list(part.clip)}; accepted is [least, greatest]")


def _sum(parts: Sequence[Part], scores: Mapping[str, Score]) -> Score:
    numbers: dict[str, float | None] = {}
    for part in parts:
        score = scores[part.name]
        if score.error is not None:
            kind = InvalidScore if isinstance(score, InvalidScore) else Score
            return kind(None, error=f"{part.name}: {score.error}", missing=(part.name,))
        silent = score.value is None and not score.components  # which costs a part its number, and no more
        if part.of is not None and part.of != ACCURACY and part.of not in score.components and not silent:
            has = ", ".join(score.components) or "none"
            error = f"{part.name}: its verifier gave no component {part.of!r}; it gave {has}"
            return InvalidScore(None, error=error, missing=(part.name,))
        number = as_score(_number(part, score))
        if number.error is not None:  # infinity, which a clip could hide
            return InvalidScore(None, error=f"{part.name}: {number.error}", missing=(part.name,))
        numbers[part.name] = number.value
    components = {part.name: _term(part, numbers) for part in parts if numbers[part.name] is not None}
    accuracy = next((score.accuracy for score in scores.values() if score.accuracy is not None), None)
    notes = {name: score.notes for name, score in scores.items() if score.notes}
    missing = tuple(part.name for part in parts if numbers[part.name] is None)
    return Score(sum(components.values()) if components else None, components, accuracy, notes=notes, missing=missing)


def _number(part: Part, score: Score) -> float | None:
    if part.of is None:
        return score.value
    return score.accuracy if part.of == ACCURACY else score.components.get(part.of)


def _term(part: Part, numbers: Mapping[str, float | None]) -> float:
    if part.gate is not None and not (numbers[part.gate] or 0) > 0:
        return 0.0
    number = numbers[part.name]
    assert number is not None
    if part.clip is not None:
        number = min(max(number, part.clip[0]), part.clip[1])
    return part.weight * number
