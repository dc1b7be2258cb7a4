"""The config file of a small run, as tests of the configuration change it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from es_engine.config import Config, ConfigError, load_config

SMALL: dict[str, Any] = {
    "name": "small",
    "model": {"source": "org/model"},
    "optimizer": {"lr": 1},
    "task": {"kind": "countdown"},
    "budget": {"generations": 3},
}
SMALL_YAML = yaml.safe_dump(SMALL)


def write(path: Path, text: str) -> Path:
    """A file with this text, in folders that are made for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def load(tmp_path: Path, *overrides: str) -> Config:
    """The config, with overrides as on the command line."""
    return load_config(write(tmp_path / "small.yaml", SMALL_YAML), overrides)


def refusal(tmp_path: Path, *overrides: str) -> str:
    """In which words it is refused with these overrides."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, *overrides)
    return str(caught.value)
