"""What the pool does with calls, deaths and time limits, on a cluster that is made up and a clock that only waiting
moves."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from es_engine.config import parse_config
from workers import pool as pools
from workers.pool import Call, Pool

Behaviour = Callable[[int, str, tuple[Any, ...]], tuple[float, Any]]
"""(number of the process, method, arguments) to the seconds that a task takes and its result, or how it ends."""


class Process:
    """A Ray actor; any attribute is a method that can be called remotely."""

    def __init__(self, cluster: Cluster, number: int, options: dict[str, Any]) -> None:
        self.cluster, self.number, self.options = cluster, number, options
        self.tasks: list[SimpleNamespace] = []
        self.dead = False

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: self.begin(method, arguments))

    def begin(self, method: str, arguments: tuple[Any, ...]) -> SimpleNamespace:
        seconds, outcome = self.cluster.behave(self.number, method, arguments)
        if self.dead:
            seconds, outcome = 0.0, ActorDiedError()
        running = sum(task.ends > self.cluster.now for task in self.tasks)
        assert running < self.options.get("max_concurrency", 1), "a call would wait behind another"
        self.tasks.append(SimpleNamespace(process=self, ends=self.cluster.now + seconds, outcome=outcome))
        return self.tasks[-1]

    def die(self) -> None:
        self.dead = True
        for task in self.tasks:
            if task.ends > self.cluster.now:
                task.ends, task.outcome = self.cluster.now, ActorDiedError()


class Cluster:
    """As much of Ray as the pool uses."""

    def __init__(self, behave: Behaviour) -> None:
        self.behave = behave
        self.now = 0.0
        self.processes: list[Process] = []
        self.setups: dict[int, Any] = {}

    def is_initialized(self) -> bool:
        return True

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": f"{number:056x}", "Alive": True, "Resources": {"CPU": 2.0}} for number in range(2)]

    def put(self, value: Any) -> Any:
        return value

    def remote(self, _: type) -> Any:
        return SimpleNamespace(
            options=lambda **options: SimpleNamespace(remote=lambda *arguments: self.start(options, arguments))
        )

    def start(self, options: dict[str, Any], arguments: tuple[Any, ...]) -> Process:
        if arguments:
            self.setups[len(self.processes)] = arguments[0]
        self.processes.append(Process(self, len(self.processes), options))
        return self.processes[-1]

    def wait(self, tasks: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        self.now = max(self.now, min(self.now + timeout, *(task.ends for task in tasks)))
        done = [task for task in tasks if task.ends <= self.now][:num_returns]
        for task in done:
            if isinstance(task.outcome, ActorDiedError):
                task.process.die()
        return done, [task for task in tasks if task not in done]

    def get(self, task: Any) -> Any:
        if isinstance(task.outcome, Exception):
            raise task.outcome
        return task.outcome

    def kill(self, process: Process) -> None:
        process.die()


class Notices(list[str]):
    """What the pool told."""

    def __call__(self, text: str) -> None:
        self.append(text)


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Pool, Cluster, Notices]]:
    """Starts a pool whose workers behave as told."""

    def started(
        behave: Behaviour, engine: dict[str, Any] | None = None, **fields: Any
    ) -> tuple[Pool, Cluster, Notices]:
        cluster, notices = Cluster(behave), Notices()
        monkeypatch.setattr(pools, "ray", cluster)
        monkeypatch.setattr(pools, "time", SimpleNamespace(monotonic=lambda: cluster.now))
        config = parse_config(
            {
                "name": "test",
                "model": {"source": "none"},
                "optimizer": {"lr": 1.0},
                "task": {},
                "engine": engine or {"kind": "hf", "device": "cpu"},
                "pool": {"workers": 2, **fields},
                "budget": {"generations": 1},
            }
        )
        setup: Any = SimpleNamespace(config=config)
        return Pool(setup, notices), cluster, notices

    return started


def well(process: int, method: str, arguments: tuple[Any, ...]) -> tuple[float, Any]:
    """Starts, and is assigned, in a second; a call's first argument is how long it takes, and its result the process
    that did it."""
    return (1.0, {}) if method in ("start", "assign") else (float(arguments[0]), process)


def call(seconds: float, preferred: int | None = None) -> Call:
    return Call(f"a call of {seconds} s", "evaluate", (seconds,), preferred)


def test_whoever_is_free_takes_the_next_call_and_results_come_in_order(start: Any) -> None:
    pool, cluster, _ = start(well)
    assert pool.run([call(5), call(1), call(1), call(1), call(4)]) == [0, 1, 1, 1, 1]
    assert cluster.now == 1 + 7
    assert pool.run([]) == []


def test_a_call_waits_for_the_living_worker_it_prefers(start: Any) -> None:
    pool, cluster, _ = start(well)
    assert pool.run([call(3, 1), call(3, 1), call(1, 0), call(1), call(1, 7)]) == [1, 1, 0, 0, 0]
    assert cluster.now == 1 + 6


def test_a_dead_workers_call_goes_to_another_that_need_not_wait_for_its_replacement(start: Any) -> None:
    def fragile(process: int, method: str, arguments: tuple[Any, ...]) -> tuple[float, Any]:
        if process == 1 and method != "start":
            return 2.0, ActorDiedError()
        return (100.0 if process == 2 else 1.0, {}) if method == "start" else (float(arguments[0]), process)

    pool, cluster, notices = start(fragile)
    assert pool.run([call(5, 0), call(5, 1)]) == [0, 0]
    assert cluster.now == 1 + 10
    assert pool.restarts == 1
    assert pool.retries == 1
    assert notices == ["worker 1 is replaced (ActorDiedError)", "a call of 5 s is given out again"]
    assert [notice.about for notice in notices] == [{"worker": 1}, {"worker": 1, "call": "a call of 5 s"}]
    assert pool.states() == {"busy": 0, "idle": 1, "starting": 1}


def test_a_call_that_kills_every_worker_ends_the_run(start: Any) -> None:
    def deadly(process: int, method: str, arguments: tuple[Any, ...]) -> tuple[float, Any]:
        return (1.0, {}) if method == "start" else (1.0, ActorDiedError() if arguments[0] == 9 else process)

    pool, _, _ = start(deadly, retries=2)
    with pytest.raises(RuntimeError, match=r"a call of 9 s cost 3 workers"):
        pool.run([call(1), call(9)])
    assert pool.restarts == 3


def test_time_limits_count_from_the_beginning_of_each_call(start: Any) -> None:
    pool, _, notices = start(well, workers=1, chunk_timeout_s=10.0)
    assert pool.run([call(9)] * 5) == [0] * 5
    assert not notices


def test_a_call_past_its_limit_goes_to_another_worker(start: Any) -> None:
    def stuck(process: int, method: str, arguments: tuple[Any, ...]) -> tuple[float, Any]:
        return (1e9, None) if process == 0 and method != "start" else well(process, method, arguments)

    pool, cluster, notices = start(stuck, chunk_timeout_s=100.0)
    assert pool.run([call(30)]) == [1]
    assert cluster.now < 1 + 100 + 5 + 30
    assert notices == [
        "waiting 61 s for a call of 30 s on worker 0",
        "worker 0 is replaced (a call of 30 s took more than 100 s)",
        "a call of 30 s is given out again",
    ]
    assert notices[0].about == {"worker": 0, "call": "a call of 30 s"}


# --- another run


def assigned(name: str) -> Any:
    """The setup of another run."""
    return SimpleNamespace(name=name)


def test_every_living_worker_is_assigned_once_and_the_next_to_start_begins_with_the_run(start: Any) -> None:
    told: list[tuple[int, str, Any]] = []

    def listening(process: int, method: str, arguments: tuple[Any, ...]) -> tuple[float, Any]:
        told.append((process, method, [argument for argument in arguments if isinstance(argument, SimpleNamespace)]))
        if (process, method) == (1, "assign"):
            return 1.0, ActorDiedError()
        return (2.0, {}) if method in ("start", "assign") else (float(arguments[0]), process)

    pool, cluster, _ = start(listening)
    other = assigned("other")
    pool.assign(other)
    assert told[2:] == [(0, "assign", [other]), (1, "assign", [other]), (2, "start", [])]
    assert pool.run([call(5), call(5)]) == [0, 2]
    assert cluster.setups[0] is cluster.setups[1]
    assert cluster.setups[2] is other
    assert pool.restarts == 1


def test_a_replacement_that_is_still_starting_for_the_run_before_is_assigned_when_it_is_there(start: Any) -> None:
    told: list[tuple[int, str]] = []

    def slow(process: int, method: str, arguments: tuple[Any, ...]) -> tuple[float, Any]:
        told.append((process, method))
        if (process, method) == (1, "evaluate"):
            return 1.0, ActorDiedError()
        return ((50.0 if process == 2 else 1.0), {}) if method != "evaluate" else (float(arguments[0]), process)

    pool, _, _ = start(slow)
    assert pool.run([call(5, 0), call(5, 1)]) == [0, 0]
    told.clear()
    pool.assign(assigned("other"))
    assert told == [(0, "assign"), (2, "assign")]


# --- workers that share a process


def shared(process: int, method: str, arguments: tuple[Any, ...]) -> tuple[float, Any]:
    """As `well`, where `carry_out` is told the worker and the method."""
    assert method == "carry_out"
    worker, inner, *rest = arguments
    seconds, _ = well(process, inner, tuple(rest))
    return seconds, {} if inner in ("start", "assign") else (worker, process)


def test_simulated_workers_share_as_few_processes_as_hold_them(start: Any) -> None:
    pool, cluster, _ = start(shared, {"kind": "simulated", "workers_per_process": 4}, workers=9)
    assert [process.options["max_concurrency"] for process in cluster.processes] == [3, 3, 3]
    assert {process.options["num_cpus"] for process in cluster.processes} == {0}
    assert len({process.options["scheduling_strategy"].node_id for process in cluster.processes}) == 2
    assert pool.run([call(5)] * 9) == [(worker, worker % 3) for worker in range(9)]
    assert cluster.now == 1 + 5


def test_auto_simulates_a_worker_for_each_core(start: Any) -> None:
    pool, _, _ = start(shared, {"kind": "simulated"}, workers="auto")
    assert len(pool.workers) == 4


def test_workers_that_share_a_process_die_together_and_move_together(start: Any) -> None:
    def fragile(process: int, method: str, arguments: tuple[Any, ...]) -> tuple[float, Any]:
        seconds, outcome = shared(process, method, arguments)
        return (2.0, ActorDiedError()) if process == 0 and arguments[:2] == (2, "evaluate") else (seconds, outcome)

    pool, cluster, _ = start(fragile, {"kind": "simulated", "workers_per_process": 2}, workers=4)
    results = pool.run([call(5) for _ in range(4)])
    assert sorted(worker for worker, _ in results) == [0, 1, 2, 3]
    assert {process for _, process in results} == {1, 2}
    assert len(cluster.processes) == 3
    assert pool.restarts == 2
    assert cluster.now == 1 + 2 + 1 + 5


def test_hundreds_of_late_workers_are_told_of_on_one_screen(start: Any) -> None:
    engine = {"kind": "simulated", "workers_per_process": 100}
    pool, _, notices = start(shared, engine, workers=200)
    pool.run([call(100)] * 200)
    assert notices[0] == "waiting 61 s for a call of 100 s on worker 0"
    assert notices[-1] == "and as long for 192 other workers"
    assert len(notices) == 9


def test_workers_that_share_a_process_start_for_the_present_run(start: Any) -> None:
    starts: list[Any] = []

    def listening(process: int, method: str, arguments: tuple[Any, ...]) -> tuple[float, Any]:
        if arguments[1] == "start":
            starts.append(arguments[2])
        return shared(process, method, arguments)

    pool, cluster, _ = start(listening, {"kind": "simulated", "workers_per_process": 2}, workers=2)
    cluster.processes[0].die()  # which nobody has noticed yet
    starts.clear()
    pool.assign(assigned("other"))
    assert starts == [assigned("other")] * 2
    assert len(cluster.processes) == 2
