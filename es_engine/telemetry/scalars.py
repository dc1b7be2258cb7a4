"""The scalars of a generation or an evaluation by their tags, the same in TensorBoard, W&B and MLflow."""

from __future__ import annotations

from es_engine.telemetry.base import Line, numbers

TAGS = {
    "reward_mean": "reward/mean",
    "reward_best": "reward/best",
    "accuracy": "reward/accuracy",
    "fitness_spread": "population/fitness_spread",
    "constant_members": "population/constant_members",
    "sigma": "step/sigma",
    "lr": "step/lr",
    "theta_rms": "step/theta_rms",
    "delta_norm": "step/delta_norm",
    "delta_norm_ratio": "step/delta_norm_ratio",
    "rollouts": "throughput/rollouts",
    "tokens": "throughput/tokens",
    "prompt_tokens": "throughput/prompt_tokens",
    "seconds": "seconds/generation",
    "seconds_rollouts": "seconds/rollouts",
    "seconds_update": "seconds/update",
    "rescored": "failures/rescored",
    "worker_restarts": "failures/worker_restarts",
}
MAPPINGS = ("components", "failures", "spent", "learning", "times")


def generation_scalars(line: Line) -> dict[str, float]:
    """The scalars of a generation, those that it has."""
    scalars: dict[str, float] = {tag: line[key] for key, tag in TAGS.items() if line[key] is not None}
    scalars |= numbers({name: line[name] for name in MAPPINGS})
    scalars["throughput/tokens_per_second"] = line["tokens"] / line["seconds"]
    return scalars


def evaluation_scalars(line: Line) -> dict[str, float]:
    """The scalars of an evaluation."""
    return {f"evaluation/{name}": value for name, value in numbers(line)}
