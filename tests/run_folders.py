"""Run folders with results that a test gives, alone or as the trials of a comparison, which have measures too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from es_engine.compare.measures import (
    BeforeAndAfter,
    DeltaNorm,
    KlToBase,
    Measures,
    SampledEvaluation,
    write_measures,
)
from es_engine.compare.plan import Trial
from es_engine.config import ComparisonConfig, Config, parse_comparison
from es_engine.costs import Costs
from es_engine.run_folder import RunFolder, write_json_lines

Array = npt.NDArray[np.float64]

SHARED = {
    "model": {"source": "hub/model"},
    "task": {"kind": "countdown", "template": "plain", "numbers": [2], "max_tokens": 8},
    "pool": {"workers": 1},
    "engine": {"kind": "hf"},
    "evaluation": {"problems": 16, "every": 2},
    "optimizer": {"kind": "sgd", "lr": 1.0},
}


def comparison_of(**fields: Any) -> ComparisonConfig:
    """A comparison of ES and GRPO with two learning rates each; `fields` replace what it has."""
    data: dict[str, Any] = {
        "name": "methods",
        "run": SHARED,
        "budget": {"tokens": 4000},
        "seeds": [1, 2, 3],
        "tuning": {"seed": 0, "problems": 8},
        "runs": {
            "es": {"method": {"kind": "es", "sigma": 0.5}, "grid": {"optimizer.lr": [3.0, 6.0]}},
            "grpo": {
                "method": {"kind": "grpo"},
                "optimizer": {"kind": "adam"},
                "grid": {"optimizer.lr": [1e-4, 1e-3]},
            },
        },
    }
    return parse_comparison({**data, **fields})


def write_run(
    path: Path,
    config: Config,
    *,
    accuracy: Array,
    rewards: Array | None = None,
    every: int = 2,
    costs: Costs | None = None,
    record: Mapping[str, Any] | None = None,
) -> Path:
    """The folder of a finished run with held-out accuracy (E, P), or (E, P, n) with n samples, at steps 0, every, 2
    every, ...; rewards are the same unless given, NaN where there is no score.

    Each step has these costs, 1,000 tokens by default; `record` is laid over what the ledger has of each step.
    """
    accuracy = accuracy if accuracy.ndim == 3 else accuracy[..., None]
    rewards = accuracy if rewards is None else rewards.reshape(accuracy.shape)
    folder = RunFolder(path)
    folder.create(config)
    ledger = folder.open_ledger()
    ledger.append({"kind": "run", "config": config.model_dump(mode="json"), "model": "made up", "dim": 4})
    for step in range((len(accuracy) - 1) * every):
        ledger.append(_generation(config, step, costs or Costs(1000, 5000, 10**9, 2.0)) | dict(record or {}))
    for number in range(len(accuracy)):
        step = number * every
        write_json_lines(folder.samples_file(step), _samples(rewards[number], accuracy[number]))
        folder.open_evaluations().append(_evaluation(step, rewards[number], accuracy[number]))
    folder.adapter.mkdir()
    return path


def _generation(config: Config, step: int, costs: Costs) -> dict[str, Any]:
    line: dict[str, Any] = {
        "kind": "generation",
        "step": step,
        "prompts": ["a", "b"],
        "rewards": [[0.0, 1.0], [1.0, 1.0], [0.0, 0.5], [0.2, 0.1]],
        "reward_mean": 0.475,
        "accuracy": 0.375,
        "components": {"solved": 0.4},
        "rollouts": 8,
        "tokens": costs.generated,
        "prompt_tokens": 100,
        "truncated": 1,
        "looped": 0,
        "unscored": 1,
        "failures": {"countdown": {"timeout": 1}, "bonus": {"no score": 5}},
        "rescored": 0,
        "times": {"generate": 1.0, "score": 0.5, "rollouts": 1.5, "update": 0.25, "total": 2.0},
        "workers": [0],
        "costs": costs.to_json(),
        "lr": config.optimizer.lr,
        "moves": 1,
        "theta": f"{step:032x}",
        "restarts": 0,
        "speculative": 0,
    }
    if config.method.kind == "es":
        members = [[0, 1], [0, -1], [1, 1], [1, -1]]
        return line | {
            "sigma": 0.5,
            "members": members,
            "chunks": [4],
            "reward_best": 1.0,
            "fitness_spread": 0.3,
            "constant_members": 1,
        }
    return line | {"constant_groups": 1, "learning": {"loss": 0.1, "norm": 1.0}}


def _evaluation(step: int, rewards: Array, accuracy: Array) -> dict[str, Any]:
    scored = rewards[~np.isnan(rewards)]
    return {
        "kind": "evaluation",
        "step": step,
        "theta": f"{step:032x}",
        "problems": len(rewards),
        "samples": rewards.shape[1],
        "reward": float(scored.mean()) if scored.size else None,
        "reward_ci95": None,
        "components": {"solved": 0.4},
        "tokens": 8 * rewards.size,
        "prompt_tokens": 100,
        "truncated": 0,
        "looped": 0,
        "failures": {},
        "costs": Costs(8 * rewards.size, 100, 10**8, 1.0).to_json(),
        "times": {"generate": 1.0, "score": 0.5},
        "accuracy": None if np.isnan(accuracy).all() else float(np.nan_to_num(accuracy).mean()),
        "accuracy_ci95": None,
        "pass_at_k": {},
    }


def _samples(rewards: Array, accuracy: Array) -> Sequence[dict[str, Any]]:
    return [
        {
            "id": f"problem-{problem}",
            "prompt": f"{problem}:",
            "completion": f"answer {sample}",
            "answer": str(problem),
            "reward": _number(rewards[problem, sample]),
            "accuracy": _number(accuracy[problem, sample]),
            "components": {"solved": _number(accuracy[problem, sample])},
            "tokens": 8,
        }
        for problem in range(rewards.shape[0])
        for sample in range(rewards.shape[1])
    ]


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def made_up_measures(problems: int, other_tasks: Mapping[str, BeforeAndAfter] | None = None) -> Measures:
    """The measures of a run whose test split has so many problems."""
    return Measures(
        sampled=SampledEvaluation(samples=4, temperature=1.0, correct=tuple(place % 5 for place in range(problems))),
        kl=KlToBase(per_token=0.01, per_completion=0.1, completions=problems),
        delta=DeltaNorm(absolute=2.0, relative=0.02),
        other_tasks=dict(other_tasks or {}),
    )


def finish(
    trial: Trial,
    folder: Path,
    accuracy: Array,
    rewards: Array | None = None,
    measures: Measures | None = None,
    **run: Any,
) -> Path:
    """What a trial of a comparison in this folder leaves; the arguments of `write_run`. Its run folder."""
    path = write_run(folder / trial.folder, trial.config, accuracy=accuracy, rewards=rewards, **run)
    if trial.purpose == "final":
        write_measures(path, measures or made_up_measures(accuracy.shape[1]))
    return path
