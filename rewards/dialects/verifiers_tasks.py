"""Rewards of verifiers 0.4, where a Task has data and methods marked @reward that read a Trace of the rollout.

`verifiers:package.module` is the Task of the Taskset in the module's __all__; `verifiers:package.module:Name` is a Task
class, or a function `(task, trace) -> reward`, which that version plugs into a task's config. A reward gets `task` (the
data: the row's fields, `prompt` and `answer`) and `trace` by name, and returns a number or named numbers. The score is
their weighted sum, and the components are its terms. Metrics and judges are left out, and so is what needs a sandbox:
a Task one of whose rewards has to have a `runtime` is refused, and setup() and finalize() are not called.

The package itself is not needed beyond what the task's module imports. The trace is one of our own, with those
attributes of `verifiers.v1.trace.Trace` that a single answer has.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

from rewards import dialects
from rewards.base import Rollout, Score
from rewards.dialects import BatchVerifier, Reference, as_asked, chat, then

Reward = Callable[..., Any]


@dataclass
class Trace:
    """A rollout of one turn."""

    task: Any
    messages: list[Any]
    is_truncated: bool
    info: dict[str, Any] = field(default_factory=dict)
    state: SimpleNamespace = field(default_factory=SimpleNamespace)
    rewards: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float | None] = field(default_factory=dict)
    tool_messages: tuple[Any, ...] = ()
    errors: tuple[Any, ...] = ()
    num_turns: int = 1
    num_branches: int = 1
    is_completed: bool = True

    @property
    def last_message(self) -> Any:
        """The model's answer."""
        return self.messages[-1]

    @property
    def assistant_messages(self) -> list[Any]:
        """What the model said."""
        return [self.last_message]

    @property
    def last_reply(self) -> str:
        """The text of the model's answer."""
        return str(self.last_message.content).strip()

    @property
    def transcript(self) -> str:
        """All messages as text."""
        return "\n\n".join(f"[{message.role}]\n{message.content}" for message in self.messages)


def is_reward(found: Any) -> bool:
    """Whether it is a Task, or a function that reads a trace."""
    return hasattr(found, "data_type") or "trace" in inspect.signature(found).parameters


def task_of(module: ModuleType) -> type | None:
    """The Task of the Taskset that a module exports."""
    exported = [getattr(module, name, None) for name in getattr(module, "__all__", ())]
    return next((each.task_type() for each in exported if isinstance(each, type) and hasattr(each, "task_type")), None)


def load(found: Any, reference: Reference) -> BatchVerifier:
    """The verifier of a Task or a function. Raises ValueError for one that needs a sandbox or has no reward."""
    reference.refuse_arguments()
    rewards = _rewards_of(found) if isinstance(found, type) else [found]
    if not rewards:
        raise ValueError(f"verifier: the task {found.__name__} of {reference.where} has no method marked @reward")
    for reward in rewards:
        if _needs_runtime(reward):
            raise ValueError(f"verifier: the reward {reward.__name__} of {reference.where} needs a sandbox to run in")

    def score_one(rollout: Rollout) -> Any:
        task = _task(found, rollout) if isinstance(found, type) else None
        data = SimpleNamespace(**_fields(rollout)) if task is None else task.data
        given = {"task": data, "trace": _trace(data, found.__name__, rollout)}
        bound = rewards if task is None else [getattr(task, reward.__name__) for reward in rewards]
        return then(dialects.together([_call(reward, given) for reward in bound]), _sum)

    def _sum(results: list[Any]) -> Score:
        terms: dict[str, float] = {}
        for reward, result in zip(rewards, results, strict=True):
            named = result if isinstance(result, Mapping) else {reward.__name__: result}
            terms |= {name: getattr(reward, "_vf_weight", 1.0) * dialects.plain(part) for name, part in named.items()}
        return dialects.score(sum(terms.values()), terms)

    def score_batch(rollouts: Sequence[Rollout]) -> Any:
        return dialects.together([score_one(rollout) for rollout in rollouts])

    return score_batch


def _rewards_of(task: type) -> list[Reward]:
    """The methods marked @reward, the most derived override of each, by priority and then name."""
    methods = [getattr(task, name) for name in dir(task) if callable(getattr(task, name))]
    marked = [method for method in methods if hasattr(method, "reward")]
    return sorted(marked, key=lambda method: (-getattr(method, "reward_priority", 0), method.__name__))


def _needs_runtime(reward: Reward) -> bool:
    runtime = inspect.signature(reward).parameters.get("runtime")
    return runtime is not None and runtime.default is inspect.Parameter.empty


def _task(task: Any, rollout: Rollout) -> Any:
    return task(task.data_type().model_validate(_fields(rollout)))


def _fields(rollout: Rollout) -> dict[str, Any]:
    prompt, _ = as_asked(rollout)
    return {"answer": rollout.answer, **rollout.info, "prompt": prompt}


def _trace(data: Any, name: str, rollout: Rollout) -> Trace:
    prompt, completion = chat(rollout)
    messages = [SimpleNamespace(reasoning_content=None, tool_calls=None, **message) for message in prompt + completion]
    return Trace(SimpleNamespace(type=name, data=data), messages, rollout.finish_reason == "length")


def _call(reward: Reward, given: Mapping[str, Any]) -> Any:
    names = inspect.signature(reward).parameters
    return reward(**{name: value for name, value in given.items() if name in names})
