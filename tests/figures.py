"""Figures of a run, made up, and telemetry that is opened to be told them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from es_engine.config import Config, parse_config
from es_engine.run_folder import RunFolder
from es_engine.telemetry import open_telemetry
from es_engine.telemetry.base import Broadcast, EvaluationLine, GenerationLine
from workers.canary import CanaryReport

ALONE = {"console": False, "tensorboard": False, "log": False}
"""What turns all off that a config has not asked for, so that what is laid over it is alone."""
EVALUATION: dict[str, Any] = {
    **EvaluationLine(
        step=10,
        reward=0.39,
        reward_ci95=[0.35, 0.43],
        accuracy=0.21875,
        accuracy_ci95=None,
        pass_at_k={"1": 0.21875, "4": 0.5},
        components={"format": 1.0},
        problems=16,
        samples=4,
        tokens=900,
        prompt_tokens=160,
        seconds=2.5,
        times={"generate": 2.0, "score": 0.25},
        failures={"mine": {"timeout": 0, "exception": 2}},
        rescored=0,
    ),
    "theta": "a fingerprint",
}


def generation(step: int = 2, **changes: Any) -> dict[str, Any]:
    """The line of a generation, with other figures where they are given."""
    line = GenerationLine(
        step=step,
        stage=1,
        generations=100,
        reward_mean=0.3125,
        reward_best=0.5,
        fitness_spread=0.0412,
        accuracy=0.185,
        components={"exact": 0.2, "format": 0.1125},
        rollouts=256,
        tokens=12000,
        prompt_tokens=5120,
        spent={"generated": 36_000, "processed": 140_000, "flops": 2.5e12, "worker_seconds": 57.0},
        seconds=10.0,
        seconds_rollouts=9.3,
        seconds_update=0.2,
        times={"generate": 17.5, "score": 0.75},
        sigma=0.03,
        lr=0.5,
        learning={},
        theta_rms=0.011,
        delta_norm=1.5,
        delta_norm_ratio=0.015,
        constant_members=1,
        failures={"mine.py:right": {"timeout": 3, "exception": 0}, "length": {"no score": 1}},
        rescored=1,
        worker_restarts=0,
        eta_seconds=970.2,
    )
    return {**line, **changes}


class MadeUpWorkers:
    """As much of a pool as is told of."""

    restarts = 2
    retries = 3

    def __init__(self) -> None:
        self.canaries = {0: CanaryReport(effect=0.5, zero=0.0, reference=0.01), 1: CanaryReport(0.25, 0.001, None)}

    def states(self) -> dict[str, int]:
        return {"busy": 1, "idle": 2, "starting": 0}


def config_with(**telemetry: Any) -> Config:
    """A config with these fields of telemetry."""
    return parse_config(
        {
            "name": "told",
            "model": {"source": "none"},
            "optimizer": {"lr": 1.0},
            "task": {},
            "budget": {"generations": 1},
            "telemetry": telemetry,
        }
    )


def opened(folder: Path, first_step: int = 0, **telemetry: Any) -> Broadcast:
    """The telemetry of such a config, for a run in a folder."""
    return open_telemetry(config_with(**telemetry), RunFolder(folder), first_step, MadeUpWorkers())
