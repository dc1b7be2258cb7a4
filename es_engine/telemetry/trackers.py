"""What the loggers of experiment trackers share: a run's id there, which a resumed run goes on with, and how a missing
package is told."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from es_engine.run_folder import write_text

IDS = "trackers.json"
ID = re.compile("[A-Za-z0-9_-]{1,64}")


def required(package: str, field: str, extra: str) -> Any:
    """The package of a tracker. Raises ValueError, naming the field that asks for it, if it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(
            f"{field}: {package} is not installed; use null, or install it with `pip install es-engine[{extra}]`"
        ) from error


def remembered_id(run_dir: Path, tracker: str, make: Callable[[], str]) -> str:
    """The id that a run has in a tracker: made the first time, kept in the run folder. Raises ValueError for what can
    be none, such as a path."""
    path = run_dir / IDS
    known: dict[str, str] = _ids(path) if path.is_file() else {}
    if tracker not in known:
        known[tracker] = make()
        write_text(path, json.dumps(known, indent=2) + "\n")
    return known[tracker]


def _ids(path: Path) -> dict[str, str]:
    known = json.loads(path.read_text())
    if not (isinstance(known, dict) and all(isinstance(name, str) and ID.fullmatch(name) for name in known.values())):
        raise ValueError(f"{path}: accepted are ids by tracker, of letters, digits, - and _")
    return known
