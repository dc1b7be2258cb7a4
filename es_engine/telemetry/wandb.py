"""Weights & Biases, online or into the run folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from secrets import token_hex
from typing import Any

from es_engine.config import Config
from es_engine.config.telemetry import WandbConfig
from es_engine.telemetry.base import Line
from es_engine.telemetry.scalars import evaluation_scalars, generation_scalars
from es_engine.telemetry.trackers import remembered_id, required
from es_engine.text import name_of


class WandbTelemetry:
    """The scalars of a run and its config; files go to RUN/wandb. The key is W&B's own affair (`wandb login`).

    Raises ValueError if wandb is not installed.
    """

    def __init__(self, wanted: WandbConfig, config: Config, run_dir: Path, tell: Callable[[str], None]) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        wandb = required("wandb", "telemetry.wandb", "wandb")
        quiet = {"silent": True, "console": "off", "disable_git": True, "disable_code": True, "x_disable_stats": True}
        self._run: Any = wandb.init(
            project=wanted.project,
            entity=wanted.entity,
            mode=wanted.mode,
            dir=str(run_dir),
            id=remembered_id(run_dir, "wandb", lambda: token_hex(8)),
            name=name_of(run_dir),
            resume="allow" if wanted.mode == "online" else None,
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(**quiet),
        )
        self._logs = run_dir / "wandb"
        self._unlink_way_out()
        if self._run.url:
            tell(f"W&B: {self._run.url}")

    def generation(self, line: Line) -> None:
        self._run.log(generation_scalars(line), step=line["step"] + 1)

    def evaluation(self, line: Line) -> None:
        self._run.log(evaluation_scalars(line), step=line["step"])

    def message(self, text: str) -> None:
        """W&B is given figures only."""

    def close(self, error: BaseException | None = None) -> None:
        self._run.finish(exit_code=0 if error is None else 1)
        self._unlink_way_out()

    def _unlink_way_out(self) -> None:
        """W&B links to a log of its own in the user's cache, and nobody reads a run folder with a link out of it."""
        for link in self._logs.glob("*/logs/debug-core.log"):
            link.unlink(missing_ok=True)
