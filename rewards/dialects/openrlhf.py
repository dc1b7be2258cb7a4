"""Reward functions of OpenRLHF: `reward_func(queries, prompts, labels)`, the file that its --remote_rm_url names.

A query is the prompt, as the model read it, and the completion; a label is the problem's answer. The result is a list
or tensor of numbers, or a mapping with these as `rewards`: the numbers of `scores` and `extra_logs` are components.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rewards import dialects
from rewards.base import Rollout, Score, load_function, verifier
from rewards.dialects import BatchVerifier, Reference, then


def load(reference: Reference) -> BatchVerifier:
    """The verifier of a function, `reward_func` unless it is named. Raises ValueError where there is none."""
    reference.refuse_arguments()
    reward = load_function(reference.where, reference.function or "reward_func")

    @verifier(takes="group")
    def score_batch(rollouts: Sequence[Rollout]) -> Any:
        prompts = [rollout.prompt for rollout in rollouts]
        queries = [rollout.prompt + rollout.completion for rollout in rollouts]

        def read(result: Any) -> list[Score]:
            return _scores(result, rollouts, reference.name)

        return then(reward(queries, prompts, [rollout.answer for rollout in rollouts]), read)

    return score_batch


def _scores(result: Any, rollouts: Sequence[Rollout], name: str) -> list[Score]:
    if not isinstance(result, Mapping):
        return dialects.scores(result, rollouts, name)
    if "rewards" not in result:
        raise ValueError(f"{name} returned {', '.join(map(str, result))} without `rewards`")
    logs = {"scores": result.get("scores"), **(result.get("extra_logs") or {})}
    return [
        replace(score, components=dialects.numbers({log: _of_one(values, index) for log, values in logs.items()}))
        for index, score in enumerate(dialects.scores(result["rewards"], rollouts, name))
    ]


def _of_one(values: Any, index: int) -> Any:
    """A completion's own value; a log may also be one number for all."""
    values = values.tolist() if hasattr(values, "tolist") else values
    return values[index] if isinstance(values, Sequence) and not isinstance(values, str) else values
