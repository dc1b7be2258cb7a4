"""Files of rewards written for other libraries, rollouts for them, and how they score these."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from rewards import dialects
from rewards.base import Rollout, Score

CHAT = ({"role": "user", "content": "What is 1/3?"},)
RIGHT = Rollout(
    "<user>What is 1/3?", r"<think>x</think> \boxed{\frac{1}{3}}", r"\frac{1}{3}", {}, CHAT, (5, 6, 5, 6, 5)
)
WRONG = Rollout("<user>What is 1/3?", r"so \boxed{\frac{1}{2}}", r"\frac{1}{3}", {}, CHAT, (1, 2, 3, 4))
PLAIN = Rollout("2+2=", "4", "4", {"solution": "2*2", "level": 3})


def write(folder: Path, source: str, name: str = "mine.py") -> Path:
    """A file of rewards."""
    path = folder / name
    path.write_text(source)
    return path


def score_all(name: str, rollouts: Sequence[Rollout], **options: Any) -> list[Score]:
    """The scores of a batch, which are those of its rollouts one by one wherever the reward compares none."""
    made = dialects.load_batch(name, options)(rollouts)
    return asyncio.run(_result(made)) if inspect.isawaitable(made) else made


async def _result(scores: Any) -> Any:
    return await scores


def values(name: str, rollouts: Sequence[Rollout], **options: Any) -> list[float | None]:
    """The values alone."""
    return [score.value for score in score_all(name, rollouts, **options)]


def module_of(path: Path) -> ModuleType:
    """The file, imported as its own library would."""
    spec = importlib.util.spec_from_file_location("theirs", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
