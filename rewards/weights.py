"""The weights of a reward's components, and the verifier of a task that has them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rewards.base import VerifierSpec


def checked_weights(weights: Mapping[str, float] | None, defaults: Mapping[str, float]) -> dict[str, float]:
    """The defaults with the given weights over them. Raises ValueError for an unknown name or a weight below 0."""
    for name, weight in (weights or {}).items():
        if name not in defaults or not 0 <= weight < math.inf:
            raise ValueError(
                f"task.weights: {name!r} is {weight!r}; accepted are {', '.join(defaults)}, each a number of at least 0"
            )
    return {**defaults, **(weights or {})}


def weighted_verifier(
    name: str,
    own: str | None,
    weights: Mapping[str, float] | None,
    defaults: Mapping[str, float],
    options: Mapping[str, Any],
) -> VerifierSpec:
    """The verifier `name` with its options and weights, or the user's own, which takes neither. Raises ValueError for
    weights that are wrong or go with the user's own."""
    if own is None or own == name:
        return VerifierSpec(name, {**options, "weights": checked_weights(weights, defaults)})
    if weights is not None:
        raise ValueError(f"task.weights: weights belong to the verifier {name}, not to {own!r}; leave them out")
    return VerifierSpec(own)
