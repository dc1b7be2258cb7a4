"""Random inputs of the engines' tests."""

from __future__ import annotations

import numpy as np

from es_engine.spaces.lora import LoraSpace
from workers.engine import Vector


def random_center(space: LoraSpace, scale: float = 0.3) -> Vector:
    """A center away from the start, so that every slot, the center's too, differs from the base model."""
    step = np.random.default_rng(1).standard_normal(space.dim).astype(np.float32)
    return space.start() + np.float32(scale) * step


def random_prompts(*lengths: int) -> list[tuple[int, ...]]:
    """Token ids of prompts of these lengths, for the random models of conftest.py."""
    rng = np.random.default_rng(2)
    return [tuple(int(token) for token in rng.integers(3, 38, length)) for length in lengths]
