"""Where the figures of a run go while it runs: the console, a log, TensorBoard, Prometheus, W&B, MLflow."""

from __future__ import annotations

from rich.console import Console

from es_engine.config import Config
from es_engine.config.telemetry import TelemetryConfig
from es_engine.run_folder import RunFolder
from es_engine.telemetry.base import Broadcast, Telemetry
from es_engine.telemetry.console import console_telemetry
from es_engine.telemetry.log import LogTelemetry
from es_engine.telemetry.mlflow import MlflowTelemetry
from es_engine.telemetry.prometheus import PrometheusTelemetry, Workers, check_port
from es_engine.telemetry.tensorboard import TensorBoardTelemetry
from es_engine.telemetry.trackers import required
from es_engine.telemetry.wandb import WandbTelemetry

__all__ = ["Telemetry", "check_places", "open_telemetry"]


def check_places(wanted: TelemetryConfig) -> None:
    """Raises ValueError for a place that cannot be had, as far as that is known before there is a run."""
    if wanted.prometheus_port is not None:
        check_port(wanted.prometheus_host, wanted.prometheus_port)
    for name, place in (("wandb", wanted.wandb), ("mlflow", wanted.mlflow)):
        if place is not None:
            required(name, f"telemetry.{name}", name)


def open_telemetry(config: Config, folder: RunFolder, first_step: int, workers: Workers) -> Broadcast:
    """Open every place that the config names; the caller closes the result.

    `first_step` is the 0-based number of the first generation to come, above 0 when a run resumes. Raises ValueError
    where a place cannot be opened.
    """
    wanted, places = config.telemetry, list[Telemetry]()
    telemetry = Broadcast(places)
    try:
        if wanted.console:
            places.append(console_telemetry(Console()))
        if wanted.log:
            places.append(LogTelemetry(folder.path, first_step))
        # Before those that write, since the port may be refused.
        if wanted.prometheus_port is not None:
            host = wanted.prometheus_host
            prometheus = PrometheusTelemetry(host, wanted.prometheus_port, folder, workers)
            places.append(prometheus)
            telemetry.message(f"Prometheus metrics: http://{host}:{prometheus.port}/metrics")
        if wanted.tensorboard:
            places.append(TensorBoardTelemetry(folder.path / "tb", first_step))
        if wanted.wandb is not None:
            places.append(WandbTelemetry(wanted.wandb, config, folder.path, telemetry.message))
        if wanted.mlflow is not None:
            places.append(MlflowTelemetry(wanted.mlflow, config, folder.path, telemetry.message))
    except BaseException as error:
        telemetry.close(error)
        raise
    return telemetry
