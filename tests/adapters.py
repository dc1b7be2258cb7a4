"""Adapters for tests, with whatever in their configs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from es_engine.spaces.base import Matrix
from es_engine.spaces.lora import LoraSpace

MATRICES = (Matrix("layers.0.q_proj", 24, 16, rms=0.2), Matrix("layers.0.k_proj", 8, 16, rms=0.05))


def save_adapter(folder: Path, matrices: Sequence[Matrix] = MATRICES, **config: Any) -> Path:
    """An adapter of rank 4 with other values in its config."""
    space = LoraSpace(matrices, rank=4, alpha=8.0)
    theta = np.random.default_rng(0).standard_normal(space.dim).astype(np.float32)
    space.save(theta, folder, "base")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder
