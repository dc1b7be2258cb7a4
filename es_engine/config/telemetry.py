"""The telemetry axis: how a run is watched."""

from __future__ import annotations

from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from es_engine.config.base import ConfigModel, Text


class WandbConfig(ConfigModel):
    """Weights & Biases. Its key is none of the config's: `wandb login`, or WANDB_API_KEY."""

    project: Text = Field(default="es-engine", description="The project there.")
    entity: Text | None = Field(default=None, description="User or team; null is the one who is logged in.")
    mode: Literal["offline", "online"] = Field(
        default="offline", description="With offline RUN/wandb is written, which `wandb sync` sends later."
    )


class MlflowConfig(ConfigModel):
    """MLflow. Names and passwords are none of the config's: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."""

    tracking_uri: Text = Field(description="A server (http://...) or a store (sqlite:///FILE).")
    experiment: Text = Field(default="es-engine", description="The experiment there.")

    @model_validator(mode="after")
    def _holds_no_secret(self) -> Self:
        # The config is written into the run folder, and to the tracker itself.
        if "@" in urlsplit(self.tracking_uri).netloc:
            accepted = "an address without name and password; give these in MLFLOW_TRACKING_USERNAME and _PASSWORD"
            raise ValueError(f"tracking_uri: it holds a name or a password, accepted is {accepted}")
        return self


class TelemetryConfig(ConfigModel):
    """Where the figures of a run go while it runs."""

    console: bool = Field(
        default=True, description="Progress on the terminal, or a line a generation where there is none."
    )
    log: bool = Field(default=True, description="RUN/log.jsonl: what happened, one JSON object a line.")
    tensorboard: bool = Field(default=True, description="TensorBoard events in the run folder.")
    prometheus_port: Annotated[int, Field(ge=0, le=65535)] | None = Field(
        default=None, description="Port that serves Prometheus metrics; 0 is any free one, null serves none."
    )
    prometheus_host: Text = Field(
        default="127.0.0.1", description="The address to listen to; whoever reaches it reads the metrics."
    )
    wandb: WandbConfig | None = Field(default=None, description="Weights & Biases too; null is not.")
    mlflow: MlflowConfig | None = Field(default=None, description="MLflow too; null is not.")
