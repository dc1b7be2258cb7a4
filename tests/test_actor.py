"""What a worker asks of its engine, without a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from in_process import problems

from workers.actor import Worker
from workers.chunks import Chunk, sampling_seed
from workers.engine import CENTER, Completion, Member, Request, Sampling

GENERATION = 7
MEMBERS = (Member(0, 1), Member(0, -1))


class Silent:
    """An engine that completes nothing, and a scorer of nothing."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def generate(self, requests: Sequence[Request], _: Sampling) -> Iterator[Completion]:
        self.requests += requests
        return iter(())

    def drain(self) -> dict[Any, Any]:
        return {}


def seeds(batch: Sequence[Any], members: Sequence[Member] = (CENTER,)) -> list[int]:
    """The sampling seeds of a batch's questions, slot by slot."""
    worker: Any = Worker(Any, 0, None)  # type: ignore[arg-type]
    worker._engine = worker._scorer = silent = Silent()
    worker._setup = SimpleNamespace(config=SimpleNamespace(seed=3))
    places = (tuple(range(len(batch))),) * len(members)
    worker._roll_out(Chunk(GENERATION, 0, 0.0, tuple(members), places, Sampling(8, 2, 1.0)), batch)
    return [request.seed for request in silent.requests]


def test_members_draw_alike_and_problems_do_not() -> None:
    batch = problems(3)
    own = [sampling_seed(3, GENERATION, problem.example.id) for problem in batch]
    assert len(set(own)) == 3
    assert seeds(batch, MEMBERS) == own * 2


def test_a_problem_that_a_batch_has_again_is_completed_otherwise() -> None:
    """As where a file has fewer rows than a step has prompts: the same completions again would be no more evidence."""
    one, other = problems(2)
    found = seeds([one, other, one, one])
    assert len(set(found)) == 4
    assert found[:2] == seeds([one, other])
