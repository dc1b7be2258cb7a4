"""The base model a config names, as a local folder."""

from __future__ import annotations

from pathlib import Path

from es_engine.config import Config, TinyModelConfig
from workers.lessons import alphabet, lessons
from workers.models import resolve
from workers.tiny_model import resolve_tiny


def local_model(config: Config) -> Path:
    """Download, convert or train what is not there yet. Raises ValueError where there is no such model."""
    model = config.model
    if not isinstance(model, TinyModelConfig):
        return resolve(model.source, model.revision)
    taught = config.lessons
    return resolve_tiny(
        examples=lessons(taught),
        alphabet=alphabet(taught),
        steps=model.steps,
        batch=model.batch,
        lr=model.lr,
        seed=model.seed,
        hidden=model.hidden,
        layers=model.layers,
        heads=model.heads,
    )
