"""What every method is to the trainer: directions for theta, and a record of how they were found."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from es_engine.costs import Costs
from rewards.base import Split
from workers.calls import Call
from workers.chunks import Problem
from workers.engine import Vector

Problems = Callable[[Split, Sequence[int]], list[Problem]]
"""The task's problems of a split by number, ready for the model."""


class CallRunner(Protocol):
    """What a method needs of the pool; `size` is the number of workers."""

    @property
    def size(self) -> int: ...

    def run(self, calls: Sequence[Call]) -> list[Any]:
        """Carry out the calls; the results in their order."""
        ...

    def run_until(self, calls: Sequence[Call], enough: Callable[[Collection[int]], bool]) -> list[Any]:
        """The same, without those that are late once the numbers of those that are done are `enough`: they are
        None."""
        ...

    def put(self, value: Any) -> Any:
        """Share a value with all workers."""
        ...


@dataclass(frozen=True, slots=True)
class Report:
    """What a step leaves behind: the ledger's record of it, as plain JSON data, and what it cost."""

    record: dict[str, Any]
    costs: Costs


Directions = Generator[Vector, Vector, Report]
"""The directions of a step, each (D,), to be ascended; a direction is answered by the theta that it led to, (D,)."""


class Method(Protocol):
    """How a direction for theta is found. `slots` are the adapters that a worker's engine holds at a time."""

    slots: int

    def step(self, pool: CallRunner, theta: Vector, step: int, progress: float, problems: Problems) -> Directions:
        """Step number `step` (from 0) at theta (D,), when this part of the budget is spent. It gives no direction where
        it finds none."""
        ...
