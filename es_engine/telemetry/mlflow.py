"""MLflow: a tracking server, or a local store."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from es_engine.config import Config
from es_engine.config.base import in_yaml
from es_engine.config.telemetry import MlflowConfig
from es_engine.telemetry.base import Line
from es_engine.telemetry.scalars import evaluation_scalars, generation_scalars
from es_engine.telemetry.trackers import remembered_id, required
from es_engine.text import name_of
from rewards.trees import flat

MOST_PARAMS, MOST_METRICS = 100, 1000  # in one request, by MLflow's own limits


class MlflowTelemetry:
    """The scalars of a run as metrics and its config as parameters.

    While the store cannot be reached, figures are kept and sent with the next ones; a run does not end for it. Raises
    ValueError if mlflow is not installed or the store cannot be opened.
    """

    def __init__(self, wanted: MlflowConfig, config: Config, run_dir: Path, tell: Callable[[str], None]) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # its own, of how it is used
        self._entities = required("mlflow.entities", "telemetry.mlflow", "mlflow")
        tracking = required("mlflow.tracking", "telemetry.mlflow", "mlflow")
        self._failure = required("mlflow.exceptions", "telemetry.mlflow", "mlflow").MlflowException
        self._tell = tell
        self._waiting: list[Any] = []
        try:
            self._client: Any = tracking.MlflowClient(tracking_uri=wanted.tracking_uri)
            self._id = remembered_id(run_dir, "mlflow", lambda: self._begin(wanted, config, run_dir))
            self._client.update_run(self._id, status="RUNNING")
        except self._failure as error:
            raise ValueError(f"telemetry.mlflow: {wanted.tracking_uri} cannot be used ({error})") from error

    def _begin(self, wanted: MlflowConfig, config: Config, run_dir: Path) -> str:
        experiment = self._client.get_experiment_by_name(wanted.experiment)
        number = experiment.experiment_id if experiment else self._client.create_experiment(wanted.experiment)
        run_id: str = self._client.create_run(number, run_name=name_of(run_dir)).info.run_id
        fields = flat(config.model_dump(mode="json"))
        params = [self._entities.Param(name, in_yaml(value)) for name, value in fields]
        for first in range(0, len(params), MOST_PARAMS):
            self._client.log_batch(run_id, params=params[first : first + MOST_PARAMS])
        return run_id

    def generation(self, line: Line) -> None:
        self._log(generation_scalars(line), line["step"] + 1)

    def evaluation(self, line: Line) -> None:
        self._log(evaluation_scalars(line), line["step"])

    def message(self, text: str) -> None:
        """MLflow is given figures only."""

    def close(self, error: BaseException | None = None) -> None:
        end = "FINISHED" if error is None else "FAILED" if isinstance(error, Exception) else "KILLED"
        try:
            self._send()
            self._client.set_terminated(self._id, end)
        except self._failure as failure:
            self._tell(f"MLflow has not been given the last {len(self._waiting)} figures ({failure})")

    def _log(self, scalars: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        self._waiting += [self._entities.Metric(metric_name(tag), value, now, step) for tag, value in scalars.items()]
        try:
            self._send()
        except self._failure as failure:
            self._tell(f"{len(self._waiting)} figures wait for MLflow ({failure})")

    def _send(self) -> None:
        while self._waiting:
            self._client.log_batch(self._id, metrics=self._waiting[:MOST_METRICS])
            del self._waiting[:MOST_METRICS]


def metric_name(tag: str) -> str:
    """A tag as MLflow accepts it: letters, digits and `_-. /`, and no path out of anywhere."""
    return "/".join(re.sub(r"[^\w\-. ]", "_", part) for part in tag.split("/") if part not in ("", ".", ".."))
