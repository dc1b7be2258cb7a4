"""A cluster that is made up: as much of Ray as the pool uses, on a clock that only waiting moves."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from ray.exceptions import ActorDiedError, OutOfDiskError

Behaviour = Callable[[int, str, tuple[Any, ...]], tuple[float, Any]]
"""(number of the process, method, arguments) to the seconds that a task takes and its result, or how it ends."""


class Process:
    """A Ray actor; any attribute is a method that can be called remotely."""

    def __init__(self, cluster: Cluster, number: int, options: dict[str, Any]) -> None:
        self.cluster, self.number, self.options = cluster, number, options
        self.tasks: list[SimpleNamespace] = []
        self.dead = False

    @property
    def node(self) -> str:
        return self.options["scheduling_strategy"].node_id

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: self.begin(method, arguments))

    def begin(self, method: str, arguments: tuple[Any, ...]) -> SimpleNamespace:
        seconds, outcome = self.cluster.behave(self.number, method, arguments)
        if self.dead or self.node not in self.cluster.nodes_alive:
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


def name(node: int) -> str:
    """The id of a node, as long as Ray's own."""
    return f"{node:056x}"


class Cluster:
    """As much of Ray as the pool uses."""

    def __init__(self, behave: Behaviour) -> None:
        self.behave = behave
        self.now = 0.0
        self.processes: list[Process] = []
        self.setups: dict[int, Any] = {}
        self.nodes_alive = {name(0): 2.0, name(1): 2.0}
        self.events: list[tuple[float, Callable[[], None]]] = []
        self.full_until = 0.0
        self.requests: list[list[dict[str, float]]] = []

    def is_initialized(self) -> bool:
        return True

    def nodes(self) -> list[dict[str, Any]]:
        gone = [{"NodeID": name(9), "Alive": False, "Resources": {}}]
        return gone + [{"NodeID": node, "Alive": True, "Resources": {"CPU": c}} for node, c in self.nodes_alive.items()]

    def at(self, moment: float, event: Callable[[], None]) -> None:
        """Have something happen at a time."""
        self.events.append((moment, event))

    def lose(self, node: int) -> None:
        """A node is gone, with all that ran there."""
        del self.nodes_alive[name(node)]
        for process in self.processes:
            if process.node == name(node):
                process.die()

    def join(self, node: int, cpus: float = 2.0) -> None:
        """A node joins."""
        self.nodes_alive[name(node)] = cpus

    def sleep(self, seconds: float) -> None:
        self._move(self.now + seconds)

    def _move(self, moment: float) -> None:
        self.now = max(self.now, moment)
        for event in [event for event in self.events if event[0] <= self.now]:
            self.events.remove(event)
            event[1]()

    def put(self, value: Any) -> Any:
        if self.now < self.full_until:
            raise OutOfDiskError
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
        self._move(min(self.now + timeout, *(task.ends for task in tasks)))
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
