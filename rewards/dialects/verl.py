"""Reward functions of verl: `compute_score`, for one answer or, as its BatchRewardManager calls it, for a batch.

What verl reads from the data is read from the row: `data_source`, `reward_model.ground_truth` and `extra_info`; a row
without them has the data source "", the problem's answer as its ground truth, and an empty extra_info. Arguments are
verl's reward_kwargs, passed with each call. The result is a number, or a mapping with the number as `score`: its other
numbers are components, and `acc` is the accuracy.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from rewards import dialects
from rewards.base import Rollout, Score, load_function, verifier
from rewards.dialects import BatchVerifier, Reference, then


def load(reference: Reference) -> BatchVerifier:
    """The verifier of a function, `compute_score` unless it is named. Raises ValueError where there is none."""
    compute = load_function(reference.where, reference.function or "compute_score")
    arguments = reference.arguments or {}
    takes_batch = "solution_strs" in inspect.signature(compute).parameters

    @verifier(takes="group" if takes_batch else "rollout")
    def score_batch(rollouts: Sequence[Rollout]) -> Any:
        rows = [_row(rollout) for rollout in rollouts]
        results: Any
        if takes_batch:
            results = compute(**{f"{name}s": [row[name] for row in rows] for name in rows[0]}, **arguments)
        else:
            results = dialects.together([compute(**row, **arguments) for row in rows])

        def read(results: Any) -> list[Score]:
            results = results.tolist() if hasattr(results, "tolist") else results
            if len(results) != len(rollouts):
                raise ValueError(f"{reference.name} returned {len(results)} scores for {len(rollouts)} solutions")
            return [_score(result, reference.name) for result in results]

        return then(results, read)

    return score_batch


def _row(rollout: Rollout) -> dict[str, Any]:
    row = rollout.info
    model = row.get("reward_model")
    known = isinstance(model, Mapping) and "ground_truth" in model
    return {
        "data_source": row.get("data_source", ""),
        "solution_str": rollout.completion,
        "ground_truth": model["ground_truth"] if known else rollout.answer,  # type: ignore[index]
        "extra_info": dict(row.get("extra_info") or {}),
    }


def _score(result: Any, name: str) -> Score:
    if not isinstance(result, Mapping):
        return dialects.score(result)
    if "score" not in result:
        raise ValueError(f"{name} returned {', '.join(map(str, result))} without `score`")
    parts = {str(key): part for key, part in result.items() if key not in ("score", "acc")}
    return dialects.score(result["score"], parts, result.get("acc"))
