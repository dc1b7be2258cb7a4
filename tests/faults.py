"""Workers that bring faults upon themselves, each at a phase of their work and once: where a file such as
`generate.kill` lies in the folder of faults, the next worker to come to that phase takes it away and is struck."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from workers.actor import Worker
from workers.simulated_engine import SimulatedWorker, SimulatedWorkers

FOLDER = "ES_ENGINE_FAULTS"
"""The environment variable that names the folder; processes of the cluster inherit it."""


def place(*faults: str) -> None:
    """Have each of the faults, such as `generate.kill`, strike once; one that is named twice strikes twice."""
    for number, fault in enumerate(faults):
        (Path(os.environ[FOLDER]) / f"{fault}.{number}").touch()


def left() -> list[str]:
    """The faults that have struck nobody yet."""
    return sorted(path.name for path in Path(os.environ[FOLDER]).glob("*.*.*"))


@contextmanager
def pauses(seconds: float) -> Iterator[None]:
    """Have every chunk take that much longer."""
    pause = Path(os.environ[FOLDER]) / "pause"
    pause.write_text(str(seconds))
    try:
        yield
    finally:
        pause.unlink()


def strike(phase: str) -> str | None:
    """Suffer a fault that waits for somebody in this phase; what it is, if one lives on."""
    for path in sorted(Path(os.environ[FOLDER]).glob(f"{phase}.*.*")):
        try:
            path.rename(path.with_name("struck"))
        except FileNotFoundError:  # another was quicker
            continue
        fault = path.name.split(".")[1]
        if fault in ("kill", "stop"):
            os.kill(os.getpid(), signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
        return fault
    return None


class FaultyEngine:
    """An engine whose worker may be struck."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def write_slots(self, *arguments: Any) -> None:
        strike("slots")
        self._engine.write_slots(*arguments)

    def generate(self, *arguments: Any) -> Iterator[Any]:
        fault, pause = None, Path(os.environ[FOLDER]) / "pause"
        if pause.exists():
            time.sleep(float(pause.read_text()))
        for number, completion in enumerate(self._engine.generate(*arguments)):
            if number == 1:
                fault = strike("generate")
                if fault == "raise":
                    raise RuntimeError("CUDA error: an illegal memory access was encountered")
            if fault != "short":
                yield completion

    def noise_sum(self, *arguments: Any) -> Any:
        fault = strike("sum")
        vector = self._engine.noise_sum(*arguments)
        if fault == "short":
            return vector[:-1]
        return vector * np.float32("nan") if fault == "nan" else vector


class FaultyScorer:
    """A scorer whose worker may be struck."""

    def __init__(self, scorer: Any) -> None:
        self._scorer = scorer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scorer, name)

    def drain(self) -> Any:
        strike("score")
        return self._scorer.drain()


class FaultyWorker(Worker):
    """A worker of a real engine."""

    def start(self) -> dict[str, Any]:
        described = super().start()
        self._engine: Any = FaultyEngine(self._engine)
        self._scorer = FaultyScorer(self._scorer)
        return described


class FaultySimulatedWorker(SimulatedWorker):
    """A simulated one."""

    def start(self) -> dict[str, Any]:
        described = super().start()
        self._engine: Any = FaultyEngine(self._engine)
        self._scorer: Any = FaultyScorer(self._scorer)
        return described


class FaultySimulatedWorkers(SimulatedWorkers):
    """Their process."""

    def carry_out(self, index: int, method: str, *arguments: Any) -> Any:
        if method == "start":
            (setup,) = arguments
            self._workers[index] = FaultySimulatedWorker(setup, index, self._openings)
            return self._workers[index].start()
        return super().carry_out(index, method, *arguments)
