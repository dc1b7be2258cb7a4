"""Rubrics and reward functions of the verifiers package: of environments up to 0.1, and of tasks of 0.4.

`verifiers:package.module` (an environment's id will do, and so does a file) loads its environment, with the arguments
given, and lets its rubric score: the whole list as one group, as verifiers does. Components are the rubric's metrics,
unweighted. A function of a rubric that raises counts 0 in the rubric, as in verifiers, which logs why.

`verifiers:package.module:function` is one function of a rubric. It gets what it asks for by name: prompt, completion,
answer, info, task, state and parser, or the first six in plural for a list.

In both, `info` and `task` are the row's own, else the whole row and "default". The completion is one turn, a chat where
the environment or, for a function, the prompt is one.

For tasks of verifiers 0.4 see `rewards.dialects.verifiers_tasks`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rewards import dialects
from rewards.base import Message, Rollout, Score, load_module, verifier
from rewards.dialects import BatchVerifier, Reference, as_asked, chat, then, verifiers_tasks

GROUP_NAMES = {"prompts", "completions", "answers", "states", "tasks", "infos"}


def load(reference: Reference) -> BatchVerifier:
    """The verifier of an environment, a function or a task. Raises ValueError where there is none."""
    is_file = reference.where.endswith(".py")
    # An environment's id is such as owner/name-of-it, and its module name_of_it.
    module = load_module(reference.where if is_file else reference.where.rpartition("/")[2].replace("-", "_"))
    if reference.function is not None:
        found = getattr(module, reference.function, None)
        if not callable(found):
            raise ValueError(f"verifier: {reference.where} has no function {reference.function!r}")
        if verifiers_tasks.is_reward(found):
            return verifiers_tasks.load(found, reference)
        return _of_function(found, reference)
    if hasattr(module, "load_environment"):
        return _of_environment(reference.call(module.load_environment), reference)
    task = verifiers_tasks.task_of(module)
    if task is None:
        raise ValueError(f"verifier: {reference.where} has neither load_environment() nor a Taskset in __all__")
    return verifiers_tasks.load(task, reference)


def _of_environment(environment: Any, reference: Reference) -> BatchVerifier:
    if not hasattr(environment, "rubric"):
        raise ValueError(f"verifier: load_environment() of {reference.where} made no environment with a rubric")

    @verifier(takes="group")
    async def score_batch(rollouts: Sequence[Rollout]) -> list[Score]:
        states = [await _state(environment, rollout) for rollout in rollouts]
        await environment.rubric.score_group(states)
        return [dialects.score(state["reward"], state["metrics"]) for state in states]

    return score_batch


async def _state(environment: Any, rollout: Rollout) -> Any:
    """What the environment's own rollout of one turn would leave behind, but for the model's response itself."""
    prompt, completion = chat(rollout) if environment.message_type == "chat" else (rollout.prompt, rollout.completion)
    task = rollout.info.get("task", environment.env_id or "default")
    given = {"prompt": prompt, "answer": rollout.answer, "task": task, "info": _info(rollout), "example_id": 0}
    state = await environment.setup_state(await environment.init_state(given, client=None, model=""))
    step = {**_step(prompt, completion, rollout), "trajectory_id": state["trajectory_id"]}
    await environment.add_trajectory_step(state, step)
    state["completion"] = completion
    state["is_completed"] = True
    state["is_truncated"] = step["is_truncated"]
    return state


def _of_function(function: Callable[..., Any], reference: Reference) -> BatchVerifier:
    reference.refuse_arguments()
    parameters = inspect.signature(function).parameters
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    # Only what asks for a parser needs the package.
    parser = {"parser": importlib.import_module("verifiers").Parser()} if "parser" in parameters else {}

    def call(given: Mapping[str, Any]) -> Any:
        given = {**given, **parser}
        return function(**{name: value for name, value in given.items() if takes_any or name in parameters})

    @verifier(takes="group")
    def score_group(rollouts: Sequence[Rollout]) -> Any:
        given = [_given(rollout) for rollout in rollouts]
        rewards = call({f"{name}s": [each[name] for each in given] for name in given[0]})
        return then(rewards, lambda rewards: dialects.scores(rewards, rollouts, reference.name))

    def score_each(rollouts: Sequence[Rollout]) -> Any:
        rewards = [call(_given(rollout)) for rollout in rollouts]
        return then(dialects.together(rewards), lambda rewards: dialects.scores(rewards, rollouts, reference.name))

    return score_group if GROUP_NAMES & set(parameters) else score_each


def _given(rollout: Rollout) -> dict[str, Any]:
    prompt, completion = as_asked(rollout)
    given = {
        "prompt": prompt,
        "completion": completion,
        "answer": rollout.answer,
        "task": rollout.info.get("task", "default"),
        "info": _info(rollout),
    }
    return {**given, "state": {**given, "trajectory": [_step(prompt, completion, rollout)]}}


def _step(prompt: list[Message] | str, completion: list[Message] | str, rollout: Rollout) -> dict[str, Any]:
    """A step of a trajectory, as verifiers.types.TrajectoryStep has it."""
    return {
        "prompt": prompt,
        "completion": completion,
        "response": None,
        "tokens": None,
        "reward": None,
        "advantage": None,
        "is_truncated": rollout.finish_reason == "length",
        "trajectory_id": "",
        "extras": {},
    }


def _info(rollout: Rollout) -> Any:
    return rollout.info.get("info", dict(rollout.info))
