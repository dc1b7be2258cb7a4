"""Reward functions of TRL's GRPO trainer, called as trl 1.16 calls them (trl/trainer/grpo_trainer.py).

A function gets `prompts`, `completions` and `completion_ids` and each field of the data row as a list over the
completions, `log_extra` and `log_metric` (which do nothing here) and `trainer_state` (None: there is no trainer). What
is a chat comes as lists of messages, else as text. It returns a list of numbers, None where it does not apply.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from rewards.base import Rollout, Score, load_function, verifier
from rewards.dialects import BatchVerifier, Reference, as_asked, scores, then


def load(reference: Reference) -> BatchVerifier:
    """The verifier of a reward function. Raises ValueError where there is none, ModuleNotFoundError without trl."""
    reward = _reward(reference)

    @verifier(takes="group")
    def score_batch(rollouts: Sequence[Rollout]) -> Any:
        asked = [as_asked(rollout) for rollout in rollouts]
        given = {
            **_columns(rollouts),
            "prompts": [prompt for prompt, _ in asked],
            "completions": [completion for _, completion in asked],
            "completion_ids": [list(rollout.token_ids) for rollout in rollouts],
            "trainer_state": None,
            "log_extra": _ignore,
            "log_metric": _ignore,
        }

        def read(rewards: Any) -> list[Score]:
            return scores(rewards, rollouts, reference.name)

        return then(reward(**given), read)

    return score_batch


def _reward(reference: Reference) -> Callable[..., Any]:
    if reference.function is not None:
        reward = load_function(reference.where, reference.function)
    elif reference.where.endswith(".py"):
        raise ValueError(f"verifier: {reference.name} names no function; accepted is trl:path/to/file.py:function")
    else:
        reward = _of_the_package(reference)
    if isinstance(reward, type) or reference.arguments is not None:
        reward = reference.call(reward)
    if not callable(reward):
        raise ValueError(f"verifier: {reference.name} makes a {type(reward).__name__}, not a reward function")
    return reward


def _of_the_package(reference: Reference) -> Callable[..., Any]:
    rewards = importlib.import_module("trl.rewards")
    known = [name for name in rewards.__all__ if not name.endswith("_rewards")]  # those are its modules
    if reference.where not in known:
        raise ValueError(
            f"verifier: trl.rewards has no {reference.where!r}; accepted are {', '.join(known)}, "
            "trl:path/to/file.py:function and trl:package.module:function"
        )
    if reference.where.startswith("get_") and reference.arguments is None:
        raise ValueError(f"verifier: {reference.name} makes a reward of arguments; add them as (name=value)")
    reward: Callable[..., Any] = getattr(rewards, reference.where)
    return reward


def _columns(rollouts: Sequence[Rollout]) -> dict[str, list[Any]]:
    """The fields of the rows, None where a row lacks one. TRL's own rewards read `solution`, and its examples `answer`:
    these are the problem's answer where the row has none of its own."""
    rows = [{"answer": rollout.answer, "solution": rollout.answer, **rollout.info} for rollout in rollouts]
    names = dict.fromkeys(name for row in rows for name in row if name not in ("prompt", "completion"))
    return {name: [row.get(name) for row in rows] for name in names}


def _ignore(*_: object) -> None:
    pass
