"""Prometheus metrics on a loopback port."""

from __future__ import annotations

import errno
import math

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from es_engine.telemetry.base import Line, numbers

HOST = "127.0.0.1"
GAUGES = {
    "reward_mean": ("reward_mean", "Mean reward of the last generation."),
    "reward_best": ("reward_best", "Best member's reward in the last generation."),
    "fitness_spread": ("fitness_spread", "Spread of fitness over the last generation's members."),
    "accuracy": ("accuracy", "Share of exact answers in the last generation, 0 to 1."),
    "constant_members": ("constant_members", "Members of the last generation whose rewards were all equal."),
    "sigma": ("sigma", "Scale of the perturbations."),
    "lr": ("learning_rate", "Learning rate of the last step."),
    "theta_rms": ("theta_rms", "Root mean square of theta."),
    "seconds": ("generation_seconds", "Duration of the last generation."),
    "seconds_rollouts": ("rollouts_seconds", "Time in rollouts in the last generation."),
    "seconds_update": ("update_seconds", "Time of the update in the last generation."),
}
COUNTERS = {
    "rollouts": ("rollouts", "Rollouts since this process started."),
    "tokens": ("tokens", "Tokens generated since this process started."),
}


class PrometheusTelemetry:
    """Gauges and counters at http://127.0.0.1:PORT/metrics; port 0 picks a free one, `port` says which.

    Raises ValueError where the port is taken or may not be used.
    """

    def __init__(self, port: int) -> None:
        registry = CollectorRegistry()
        self._gauges = {key: _gauge(name, text, registry) for key, (name, text) in GAUGES.items()}
        self._counters = {key: _counter(name, text, registry) for key, (name, text) in COUNTERS.items()}
        self._restarts = _counter("worker_restarts", "Workers restarted since this process started.", registry)
        self._restarts_told = 0
        self._step = _gauge("step", "Generations done.", registry)
        self._components = _gauge("reward_component", "Mean of a part of the reward.", registry, "component")
        self._spent = _gauge("spent", "What the run's steps have cost so far, evaluations apart.", registry, "measure")
        self._failures = _counter(
            "verifier_failures", "Rollouts that a verifier left without a score.", registry, "verifier", "kind"
        )
        self._learning = _gauge("learning", "Figures of the last step of a gradient method.", registry, "figure")
        self._evaluation = _gauge("evaluation", "Figures of the last held-out evaluation.", registry, "figure")
        try:
            self._server, self._thread = start_http_server(port, HOST, registry)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            reason = "in use" if error.errno == errno.EADDRINUSE else "reserved for the superuser"
            raise ValueError(
                f"telemetry.prometheus_port: port {port} is {reason} on {HOST}; accepted is a free port, 0 for any"
            ) from error
        self.port = self._server.server_port

    def generation(self, line: Line) -> None:
        self._step.set(line["step"] + 1)
        for key, gauge in self._gauges.items():
            gauge.set(_figure(line[key]))
        for key, counter in self._counters.items():
            counter.inc(line[key])
        self._restarts.inc(line["worker_restarts"] - self._restarts_told)
        self._restarts_told = line["worker_restarts"]
        for component, value in line["components"].items():
            self._components.labels(component).set(_figure(value))
        for figure, value in line["learning"].items():
            self._learning.labels(figure).set(_figure(value))
        for measure, value in line["spent"].items():
            self._spent.labels(measure).set(value)
        for verifier, kinds in line["failures"].items():
            for kind, count in kinds.items():
                self._failures.labels(verifier, kind).inc(count)

    def evaluation(self, line: Line) -> None:
        for figure, value in numbers(line):
            self._evaluation.labels(figure).set(value)

    def message(self, text: str) -> None:
        """Prometheus takes figures only."""

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _figure(value: float | None) -> float:
    """NaN stands for no figure, lest the last generation that had one be taken for this one."""
    return math.nan if value is None else value


def _gauge(name: str, text: str, registry: CollectorRegistry, *labels: str) -> Gauge:
    return Gauge(name, text, labels, namespace="es_engine", registry=registry)


def _counter(name: str, text: str, registry: CollectorRegistry, *labels: str) -> Counter:
    return Counter(name, text, labels, namespace="es_engine", registry=registry)
