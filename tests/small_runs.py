"""Small runs of a gradient method: Countdown by characters, on a random model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from es_engine.config import Config, parse_config


def small_config(model: Path, method: dict[str, Any], **axes: dict[str, Any]) -> Config:
    """A config on the hf engine; `axes` lie over what it has."""
    data: dict[str, Any] = {
        "name": "small",
        "model": {"source": str(model)},
        "space": {"rank": 4, "alpha": 8.0},
        "method": method,
        "optimizer": {"kind": "adam", "lr": 0.02},
        "task": {"kind": "countdown", "template": "plain", "numbers": [2], "high": 9, "max_tokens": 8},
        "pool": {"workers": 1},
        "engine": {"kind": "hf", "dtype": "float32", "device": "cpu"},
        "budget": {"generations": 4},
        "evaluation": {"every": 100, "problems": 8, "chunk": 8},
        "telemetry": {},
    }
    for axis, fields in axes.items():
        data[axis] = {**data[axis], **fields}
    return parse_config(data)
