"""Small runs of a method that takes gradients: Countdown by characters on a random model, in this process or on Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any
from unittest.mock import patch

from es_engine import past, session, trainer
from es_engine.config import Config, SgdConfig, dump_config, parse_config
from es_engine.methods.base import Report
from es_engine.optimizers import build_optimizer
from es_engine.session import Materials, gather, needs, worker_setup
from workers.actor import Worker, WorkerSetup
from workers.calls import Call
from workers.canary import CanaryReport
from workers.divergence import Diverged, NotFinite
from workers.engine import Vector

GENERATIONS = 4


def small_config(model: Path, method: dict[str, Any], **axes: dict[str, Any]) -> Config:
    """A config on the hf engine; `axes` are laid over what it has."""
    data: dict[str, Any] = {
        "name": "small",
        "model": {"source": str(model)},
        "space": {"rank": 4, "alpha": 8.0},
        "method": method,
        "optimizer": {"kind": "adam", "lr": 0.02},
        "task": {"kind": "countdown", "template": "plain", "numbers": [2], "high": 9, "max_tokens": 8},
        "pool": {"workers": 1},
        "engine": {"kind": "hf", "dtype": "float32", "device": "cpu"},
        "budget": {"generations": GENERATIONS},
        "evaluation": {"every": 100, "problems": 8, "chunk": 8},
    }
    for axis, fields in axes.items():
        data[axis] = {**data[axis], **fields}
    return parse_config(data)


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class LocalPool:
    """A pool of real workers in this process, which carry out calls in turn; keeps the calls."""

    def __init__(self, materials: Materials, workers: int = 1) -> None:
        self._start(worker_setup(materials, needs(materials)), workers)

    def _start(self, setup: WorkerSetup, workers: int) -> None:
        self.workers = [Worker(setup, index, None) for index in range(workers)]
        for worker in self.workers:
            worker.start()
        self.calls: list[Call] = []
        self.count_anew()

    def assign(self, setup: WorkerSetup) -> None:
        for worker in self.workers:
            worker.assign(setup)

    def close(self) -> None:
        for worker in self.workers:
            worker._scorer.close()

    @property
    def size(self) -> int:
        return len(self.workers)

    @property
    def canaries(self) -> dict[int, CanaryReport]:
        return {}

    def states(self) -> dict[str, int]:
        return {"busy": 0, "idle": self.size, "starting": 0}

    def put(self, value: Any) -> Any:
        return value

    def count_anew(self) -> None:
        self.restarts = self.speculative = self.retries = 0

    def run(self, calls: Sequence[Call]) -> list[Any]:
        self.calls += calls
        return [carry_out(worker, call) for worker, call in zip(cycle(self.workers), calls, strict=False)]


def carry_out(worker: Worker, call: Call) -> Any:
    """A worker's reply to a call, which it would give again."""
    reply = getattr(worker, call.method)(*call.arguments)
    if isinstance(fault := call.fault(reply), NotFinite):
        raise Diverged(f"{fault} in every reply to {call.name}")
    assert fault is None, fault
    return reply


def climb(materials: Materials, pool: LocalPool, steps: int, lr: float) -> tuple[Vector, list[Report]]:
    """Where gradient ascent with this step size leads from the start, and what was reported on the way."""
    state = past.beginning(materials)
    state.optimizer = build_optimizer(SgdConfig(lr=1.0), state.theta)
    reports = []
    for step in range(steps):
        directions = materials.method.step(pool, state.theta, step, 0.0, materials.problems)
        reports.append(trainer._climb(state, directions, lr)[0])
    return state.theta, reports


def materials_of(model: Path, method: dict[str, Any], **axes: dict[str, Any]) -> Materials:
    """All of a small run but its workers."""
    return gather(small_config(model, method, **axes))


class SessionPool(LocalPool):
    """Such a pool as a session starts it."""

    def __init__(self, setup: WorkerSetup, _notify: object) -> None:
        workers = setup.config.pool.workers
        assert isinstance(workers, int)
        self._start(setup, workers)


def train_here(config: Config, run: Path) -> Path:
    """Train without Ray; the run's folder."""
    with patch.object(session, "Pool", SessionPool):
        return trainer.train(config, run).path


def resume_here(run: Path) -> Path:
    """Go on without Ray; the run's folder."""
    with patch.object(session, "Pool", SessionPool):
        return trainer.resume(run).path


def train_and_kill(config: Config, run: Path, calls: int) -> Path:
    """Begin a run in a process that is killed (kill -9) in place of its so-manieth call of a worker; its folder."""
    kill_command("train", write_config(config, run.with_name(f"{run.name}.yaml")), "--run-dir", run, calls=calls)
    return run


def kill_command(*arguments: object, calls: int) -> None:
    """Run the command line, without Ray, in a process that is killed in place of its so-manieth call of a worker."""
    command = [sys.executable, __file__, str(calls), *map(str, arguments)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # as here: a sum in parts has other bits
    done = subprocess.run(command, env=one_thread, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


def write_config(config: Config, path: Path) -> Path:
    """The config as a file."""
    path.write_text(dump_config(config))
    return path


if __name__ == "__main__":
    from es_engine import cli

    most, *sys.argv[1:] = sys.argv[1:]
    run_calls = LocalPool.run

    def run_or_die(pool: LocalPool, calls: Sequence[Call]) -> list[Any]:
        if len(pool.calls) + len(calls) > int(most):
            os.kill(os.getpid(), signal.SIGKILL)
        return run_calls(pool, calls)

    with patch.object(session, "Pool", SessionPool), patch.object(LocalPool, "run", run_or_die):
        cli.main()
