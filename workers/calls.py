"""What workers are given to do: calls, rounds of them, and what is told of them."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

LATE = 3.0
"""A call is late when it has run this many times as long as the median of those of its round that are done; it may
then be given to an idle worker as well. A chunk has hundreds of rollouts, so that those of one round take about the
same time, and what takes three times as long is slow because of its worker."""
LATE_S = 1.0
"""No call is late before."""


@dataclass(frozen=True, slots=True)
class Call:
    """A method of `Worker` to be run once by any worker; `name` is for people, `preferred` the worker it suits best,
    `chunk` the number of the chunk that it is about.

    `fault` says what is wrong with a reply, None for a good one: after a bad one the worker is replaced and the call
    goes to another. Where it is `NotFinite` once more, nobody else is asked.
    """

    name: str
    method: str
    arguments: tuple[Any, ...]
    preferred: int | None = None
    chunk: int | None = None
    fault: Callable[[Any], str | None] = lambda _: None


class Notice(str):
    """A sentence about the pool for people; `about` says for programs which worker, call and chunk it is about."""

    about: Mapping[str, int | str]

    def __new__(cls, text: str, worker: int, call: Call | None = None) -> Notice:
        notice = super().__new__(cls, text)
        named = {} if call is None else {"call": call.name, "chunk": call.chunk}
        notice.about = {"worker": worker, **{name: value for name, value in named.items() if value is not None}}
        return notice


class Round:
    """The calls of one `run` and how far they are; `waiting` are the numbers of those to be given out, in their order,
    by the worker they prefer, `took` the seconds of those that are done, `repeated` those given to two workers,
    `not_finite` those to which a reply was not finite, `broke` those in which a worker raised something, and `homeless`
    since when there has been no room for the answer to a call."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = calls
        self.waiting: defaultdict[int | None, deque[int]] = defaultdict(deque)
        self.results: dict[int, Any] = {}
        self.took: list[float] = []
        self.repeated: set[int] = set()
        self.not_finite: set[int] = set()
        self.broke: set[int] = set()
        self.deaths: Counter[int] = Counter()
        self.homeless: dict[int, float] = {}
        for number, call in enumerate(calls):
            self.waiting[call.preferred].append(number)

    def take(self, worker: int, on_time: AbstractSet[int | None]) -> int | None:
        """Take out the first waiting call that prefers this worker, or else that no worker which is on time is
        preferred for."""
        candidates = [worker] if worker in self.waiting else [other for other in self.waiting if other not in on_time]
        if not candidates:
            return None
        preferred = min(candidates, key=lambda other: self.waiting[other][0])
        number = self.waiting[preferred].popleft()
        if not self.waiting[preferred]:
            del self.waiting[preferred]
        return number

    def put_back(self, number: int) -> None:
        """Have a call given out again, before the others that prefer the same worker."""
        self.waiting[self.calls[number].preferred].appendleft(number)

    @property
    def late_after(self) -> float:
        """Seconds after which a call is late."""
        return max(LATE_S, LATE * statistics.median(self.took)) if self.took else math.inf
