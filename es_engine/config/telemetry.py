"""The telemetry axis: how a run is watched."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from es_engine.config.base import ConfigModel


class TelemetryConfig(ConfigModel):
    """Where the figures of a run go while it runs."""

    console: bool = Field(
        default=True, description="Progress on the terminal, or a line a generation where there is none."
    )
    tensorboard: bool = Field(default=True, description="TensorBoard events in the run folder.")
    prometheus_port: Annotated[int, Field(ge=0, le=65535)] | None = Field(
        default=None, description="Loopback port that serves Prometheus metrics; 0 is any free one, null serves none."
    )
