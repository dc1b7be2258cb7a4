"""Prometheus metrics on a port, loopback's by default."""

from __future__ import annotations

import errno
import math
import shutil
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Protocol

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from es_engine.run_folder import RunFolder
from es_engine.telemetry.base import Line
from es_engine.telemetry.metrics import KL_FIGURES, METRICS
from es_engine.text import name_of
from workers.canary import CanaryReport

GAUGES = {
    "reward_best": "reward_best",
    "fitness_spread": "fitness_spread",
    "constant_members": "constant_members",
    "stage": "stage",
    "eta_seconds": "eta_seconds",
    "seconds": "generation_seconds",
    "delta_norm": "delta_norm",
    "delta_norm_ratio": "delta_norm_ratio",
    "theta_rms": "theta_rms",
    "sigma": "sigma",
    "lr": "learning_rate",
}
"""Keys of a generation's line, and the metrics that have the same figure."""

Values = dict[tuple[str, ...], float]
"""A metric's values by those of its labels."""


class Workers(Protocol):
    """What is asked of the pool at every scrape."""

    restarts: int
    retries: int
    canaries: dict[int, CanaryReport]

    def states(self) -> dict[str, int]:
        """Workers by what they do."""
        ...


class PrometheusTelemetry(Collector):
    """Serves the metrics at http://HOST:PORT/metrics; port 0 picks a free one, `port` says which.

    Raises ValueError where the port is taken or may not be used.
    """

    def __init__(self, host: str, port: int, folder: RunFolder, workers: Workers) -> None:
        self._folder = folder
        self._workers = workers
        self._values: defaultdict[str, Values] = defaultdict(dict)
        self._lock = threading.Lock()  # the server's threads read what the run's changes
        self._set("run_info", 1, name_of(folder.path))
        registry = CollectorRegistry()
        registry.register(self)
        with _refusal_in_words(host, port):
            self._server, self._thread = start_http_server(port, host, registry)
        self.port = self._server.server_port

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """All metrics as they are now, those without a value too."""
        with self._lock:
            values = {name: dict(by_labels) for name, by_labels in self._values.items()}
        values |= self._live()
        for metric in METRICS:
            kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = kind(metric.full_name, metric.meaning, labels=metric.labels)
            for labels, value in values.get(metric.name, {}).items():
                family.add_metric(labels, value)
            yield family

    def generation(self, line: Line) -> None:
        with self._lock:
            self._set("generation", line["step"] + 1)
            for key, name in GAUGES.items():
                self._set(name, line[key])
            self._figures("train", line["reward_mean"], line)
            self._set("tokens_per_second", line["tokens"] / line["seconds"])
            self._replace("learning", line["learning"])
            self._replace("kl", {name: value for name, value in line["learning"].items() if name in KL_FIGURES})
            self._replace("spent", line["spent"])
            self._work("train", line, line["rollouts"])
            for phase in ("rollouts", "update"):
                self._add("phase_seconds_total", line[f"seconds_{phase}"], phase)
            other = line["seconds"] - line["seconds_rollouts"] - line["seconds_update"]
            self._add("phase_seconds_total", max(0.0, other), "other")

    def evaluation(self, line: Line) -> None:
        with self._lock:
            self._figures("heldout", line["reward"], line)
            self._replace("pass_at_k", line["pass_at_k"])
            self._work("heldout", line, line["problems"] * line["samples"])
            self._add("phase_seconds_total", line["seconds"], "evaluation")

    def message(self, text: str) -> None:
        """Prometheus takes figures only."""

    def close(self, error: BaseException | None = None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _figures(self, split: str, reward: float | None, line: Line) -> None:
        self._set("reward", reward, split)
        self._set("accuracy", line["accuracy"], split)
        known = self._values["reward_component"]
        for labels in [labels for labels in known if labels[0] == split]:
            del known[labels]
        for component, value in line["components"].items():
            self._set("reward_component", value, split, component)

    def _work(self, split: str, line: Line, rollouts: int) -> None:
        self._add("rollouts_total", rollouts, split)
        self._add("rollouts_rescored_total", line["rescored"], split)
        self._add("tokens_total", line["tokens"], split, "generated")
        self._add("tokens_total", line["prompt_tokens"], split, "prompt")
        for phase, seconds in line["times"].items():
            self._add("worker_seconds_total", seconds, split, phase)
        for verifier, kinds in line["failures"].items():
            for kind, count in kinds.items():
                self._add("verifier_failures_total", count, split, verifier, kind)

    def _set(self, name: str, value: float | None, *labels: str) -> None:
        """NaN stands for no figure, lest the last generation that had one be taken for this one."""
        self._values[name][labels] = math.nan if value is None else value

    def _replace(self, name: str, by_label: Mapping[str, float | None]) -> None:
        """Set a metric of one label, whose values so far are forgotten: they may be another stage's."""
        self._values[name].clear()
        for label, value in by_label.items():
            self._set(name, value, label)

    def _add(self, name: str, value: float, *labels: str) -> None:
        self._values[name][labels] = self._values[name].get(labels, 0) + value

    def _live(self) -> dict[str, Values]:
        """What changes while nothing is told."""
        disk = shutil.disk_usage(self._folder.path)
        written = self._folder.last_checkpoint_time
        return {
            "workers": {(state,): count for state, count in self._workers.states().items()},
            "worker_restarts_total": {(): self._workers.restarts},
            "retries_total": {(): self._workers.retries},
            "canary": _worst(list(self._workers.canaries.values())),
            "last_checkpoint_age_seconds": {} if written is None else {(): time.time() - written},
            "disk_free_bytes": {(): disk.free},
            "disk_size_bytes": {(): disk.total},
        }


def check_port(host: str, port: int) -> None:
    """Raises ValueError where the port is taken or may not be used."""
    with (
        _refusal_in_words(host, port),
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET),
    ):
        pass


@contextmanager
def _refusal_in_words(host: str, port: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reasons = {
            errno.EADDRINUSE: "is in use",
            errno.EACCES: "is reserved for the superuser",
            errno.EADDRNOTAVAIL: "cannot be had: the machine has no such address",
        }
        if error.errno not in reasons:
            raise
        raise ValueError(
            f"telemetry.prometheus_port: port {port} on {host} {reasons[error.errno]}; "
            "accepted is a free port, 0 for any"
        ) from error


def _worst(canaries: Iterable[CanaryReport]) -> Values:
    """By measure the largest of all workers; of a measure that none of them took, nothing."""
    worst: Values = {}
    for report in canaries:
        for measure, value in asdict(report).items():
            if value is not None:
                worst[measure,] = max(value, worst.get((measure,), 0.0))
    return worst
