"""The weights of a reward's components, and the verifier that they belong to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rewards.base import VerifierSpec


def checked_weights(weights: Mapping[str, float] | None, defaults: Mapping[str, float]) -> dict[str, float]:
    """The defaults with what is given in their place. Raises ValueError for another name or what is no weight."""
    for name, weight in (weights or {}).items():
        if name not in defaults or not 0 <= weight < math.inf:
            raise ValueError(
                f"task.weights: {name!r} is {weight!r}; accepted are {', '.join(defaults)}, each a number of at least 0"
            )
    return {**defaults, **(weights or {})}


def verifier_spec(
    own: str,
    defaults: Mapping[str, float],
    weights: Mapping[str, float] | None,
    verifier: str | None,
    options: Mapping[str, Any] | None = None,
) -> VerifierSpec:
    """The task's `own` verifier with its weights and other options, or a user's own in its place."""
    if verifier is None or verifier == own:
        return VerifierSpec(own, {**(options or {}), "weights": checked_weights(weights, defaults)})
    if weights is not None:
        raise ValueError(f"task.weights: weights belong to the verifier {own}, not to {verifier!r}; leave them out")
    return VerifierSpec(verifier)
