"""Post-train language models without backprop: Evolution Strategies over LoRA subspaces on Ray and vLLM."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from es_engine.config import Config, load_config
    from es_engine.past import replay
    from es_engine.run import Run
    from es_engine.trainer import resume, train

__all__ = ["Config", "Run", "load_config", "replay", "resume", "train"]

_HOMES = {
    "Config": "es_engine.config",
    "load_config": "es_engine.config",
    "Run": "es_engine.run",
    "replay": "es_engine.past",
    "resume": "es_engine.trainer",
    "train": "es_engine.trainer",
}


def __getattr__(name: str) -> Any:
    """Import on first use: workers need the floors below, and not the whole house."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
