"""The check a worker passes before it takes part in a run: its slots really change the model, and in the right way.

An adapter that is zero must give the base model's log-probabilities, a random adapter must not, and both must match
the reference engine. Errors are measured against the effect of the random adapter, so one tolerance serves every
model and dtype: half precision blurs a few per cent of that effect, while a wrong scale, a swapped slice or a stale
slot is as large as the effect itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from es_engine.spaces.lora import LoraSpace
from workers.engine import CENTER, Member, PopulationEngine, Request, Vector

GENERATION = 2**64 - 1
"""The generation whose noise the canary's random adapter is made of; no run comes this far."""

SIZE = 0.2
"""The random adapter changes each matrix by this many times its RMS: far from the base model, near enough not to
break it."""

TOLERANCE = 0.25
"""Largest mean error allowed, as a part of the random adapter's mean effect on log-probabilities."""

MEMBERS = (CENTER, Member(pair=0, sign=1))


@dataclass(frozen=True, slots=True)
class CanaryReport:
    """Mean absolute differences of log-probabilities, in nats; `reference` is None where no reference was run."""

    effect: float
    zero: float
    reference: float | None


def check(
    engine: PopulationEngine, space: LoraSpace, prompts: Sequence[tuple[int, ...]], reference: PopulationEngine | None
) -> CanaryReport:
    """Compare an engine with the base model and with a reference.

    Raises ValueError, saying what is wrong, if it fails.
    """
    zero, perturbed = _slots(engine, space, prompts)
    engine.prepare(
        GENERATION, SIZE * space.matrix_scale, MEMBERS
    )  # as a run does; an engine may have two sets of slots
    again = _written(engine, space, prompts)
    base = _flat(engine.logprobs([Request(None, prompt) for prompt in prompts]))
    if not np.isfinite([zero, perturbed, base]).all():
        raise ValueError("canary: the engine gives log-probabilities that are not numbers; try another engine.dtype")
    effect = _difference(perturbed, zero)
    if effect == 0:
        raise ValueError(
            "canary: a random adapter does not change the model's log-probabilities, so slots have no effect"
        )
    change = max(_difference(first, second) for first, second in zip((zero, perturbed), again, strict=True))
    if not change <= TOLERANCE * effect:
        raise ValueError(
            f"canary: adapters written a second time differ from the first by {change:.3g} nats a token, "
            f"where a random one changes {effect:.3g}"
        )
    if _difference(zero, base) > TOLERANCE * effect:
        raise ValueError(
            f"canary: the zero adapter differs from the base model by {_difference(zero, base):.3g} nats a token, "
            f"where a random one differs by {effect:.3g}"
        )
    if reference is None:
        return CanaryReport(effect, _difference(zero, base), None)
    error = max(
        _difference(mine, theirs)
        for mine, theirs in zip((zero, perturbed), _slots(reference, space, prompts), strict=True)
    )
    if not error <= TOLERANCE * effect:  # nor NaN
        raise ValueError(
            f"canary: the engine differs from the reference by {error:.3g} nats a token, "
            f"where a random adapter changes {effect:.3g}"
        )
    return CanaryReport(effect, _difference(zero, base), error)


def _slots(engine: PopulationEngine, space: LoraSpace, prompts: Sequence[tuple[int, ...]]) -> tuple[Vector, Vector]:
    engine.set_center(_zero(space))
    return _written(engine, space, prompts)


def _written(engine: PopulationEngine, space: LoraSpace, prompts: Sequence[tuple[int, ...]]) -> tuple[Vector, Vector]:
    engine.write_slots(GENERATION, SIZE * space.matrix_scale, MEMBERS)
    found = engine.logprobs([Request(slot, prompt) for slot in range(len(MEMBERS)) for prompt in prompts])
    return _flat(found[: len(prompts)]), _flat(found[len(prompts) :])


def _zero(space: LoraSpace) -> Vector:
    """The start with one factor zero, so that DeltaW is; where both are trained A keeps its size, without which
    noise on B would have no effect."""
    theta = space.start()
    zero = "B" if "B" in space.train else "A"
    for place in space.placements:
        if place.factor == zero:
            theta[place.start : place.stop] = 0
    return theta


def _flat(logprobs: Sequence[Vector]) -> Vector:
    return np.concatenate(logprobs)


def _difference(one: Vector, other: Vector) -> float:
    return float(np.abs(one - other).mean())
