"""Run folders with results and completions that are drawn, as of a method that learns; `run_folders` has given ones."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from es_engine.config import dump_config, parse_config

METHODS: dict[str, dict[str, Any]] = {
    "es": {"kind": "es", "population": 8, "sigma": 0.3, "prompts": 4},
    "grpo": {"kind": "grpo", "prompts": 4, "samples": 4},
    "sft": {"kind": "sft", "batch": 8},
}


def write_run(
    path: Path,
    method: str = "es",
    *,
    seed: int = 0,
    steps: int = 6,
    every: int = 2,
    problems: int = 8,
    completions: Sequence[str] = ("1 + 2", "2 * 3"),
    **budget: object,
) -> Path:
    """A run of `steps` steps that was evaluated every so many of them; it learns, and its completions recur."""
    drawn = random.Random(f"{method} {seed}")
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(dump_config(config_of(path.name, method, seed)))
    write_lines(path / "ledger.jsonl", [{"kind": "run"}, *(step_line(method, step, drawn) for step in range(steps))])
    evaluated = [*range(0, steps, every), steps]
    rows = {step: sample_rows(step, problems, completions, drawn, _skill(step)) for step in evaluated}
    (path / "samples").mkdir()
    for step, samples in rows.items():
        write_lines(path / "samples" / f"step-{step:06d}.jsonl", samples)
    write_lines(path / "eval.jsonl", [evaluation_line(step, samples) for step, samples in rows.items()])
    (path / "adapter").mkdir()
    return path


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def config_of(name: str, method: str, seed: int) -> Any:
    """The config of such a run."""
    return parse_config(
        {
            "name": name,
            "seed": seed,
            "model": {"kind": "tiny", "steps": 1},
            "method": METHODS[method],
            "optimizer": {"kind": "adam", "lr": 0.02},
            "task": {"kind": "countdown", "template": "plain"},
            "engine": {"kind": "hf", "dtype": "float32", "device": "cpu"},
            "budget": {"generations": 10},
        }
    )


def step_line(method: str, step: int, drawn: random.Random) -> dict[str, Any]:
    """The line of a generation."""
    rollouts = {"es": 32, "grpo": 16, "sft": 0}[method]
    rewards = [[_skill(step) + drawn.gauss(0, 0.1) for _ in range(4)] for _ in range(rollouts // 4)]
    mean = sum(map(sum, rewards)) / rollouts if rollouts else None
    seconds = drawn.uniform(0.4, 0.6)
    line: dict[str, Any] = {
        "kind": "generation",
        "step": step,
        "prompts": [f"train-{step}-{number}" for number in range(4)],
        "reward_mean": mean,
        "accuracy": max(0.0, mean) if mean is not None else None,
        "components": {"right": mean, "form": 0.5} if rollouts else {},
        "rollouts": rollouts,
        "tokens": 11 * rollouts,
        "prompt_tokens": 20 * rollouts,
        "truncated": rollouts // 8,
        "looped": 0,
        "unscored": 1 if rollouts and step == 2 else 0,
        "failures": {"verifier": {"timeout": 1}} if rollouts and step == 2 else {},
        "times": {
            "generate": 0.6 * seconds,
            "score": 0.1,
            "rollouts": 0.7 * seconds,
            "update": 0.2,
            "total": 1.5 * seconds,
        },
        "costs": {
            "generated": 11 * rollouts,
            "processed": 31 * rollouts + 50,
            "flops": 10**9 * (rollouts + 50),
            "worker_seconds": seconds,
        },
        "lr": 0.02,
        "theta": "00",
    }
    if rollouts:
        line["rewards"] = rewards
    if method == "es":
        line |= {"members": [[pair, sign] for pair in range(4) for sign in (1, -1)], "sigma": 0.3}
        line |= {"reward_best": max(map(max, rewards)), "fitness_spread": 0.1, "constant_members": 1}
    else:
        line |= {
            "constant_groups": 1,
            "learning": {"loss": math.exp(-step / 50), "norm": 0.1, "approx_kl": 0.001 * step},
        }
    return line


def sample_rows(
    step: int, problems: int, completions: Sequence[str], drawn: random.Random, skill: float
) -> list[dict[str, Any]]:
    """The samples of an evaluation."""
    rows = []
    for number in range(problems):
        right = drawn.random() < skill
        rows.append(
            {
                "id": f"heldout-{number}",
                "prompt": f"Problem {number}: make 24 out of 4 and 6.",
                "completion": completions[(number + step) % len(completions)],
                "answer": "24",
                "reward": 0.1 + 0.9 * right,
                "accuracy": float(right),
                "components": {"right": float(right), "form": 0.5},
                "tokens": 12,
                "notes": {"equation": "4 * 6", "value": 24 if right else 10},
            }
        )
    return rows


def evaluation_line(step: int, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The line of an evaluation with such samples."""
    count = len(rows)
    reward, accuracy = (sum(row[name] for row in rows) / count for name in ("reward", "accuracy"))
    half = 1.96 * math.sqrt(max(accuracy * (1 - accuracy), 0.01) / count)
    return {
        "kind": "evaluation",
        "step": step,
        "problems": count,
        "samples": 1,
        "reward": reward,
        "reward_ci95": [reward - half, reward + half],
        "accuracy": accuracy,
        "accuracy_ci95": [max(0.0, accuracy - half), min(1.0, accuracy + half)],
        "components": {"right": accuracy, "form": 0.5},
        "pass_at_k": {"1": accuracy},
        "tokens": 12 * count,
        "failures": {},
    }


def _skill(step: int) -> float:
    return 0.8 - 0.7 * math.exp(-step / 200)
