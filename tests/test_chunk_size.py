"""`engine.chunk: auto`: which sizes are timed, and which is chosen."""

from __future__ import annotations

import numpy as np
import pytest
from in_process import FunctionRunner, problems

from es_engine.config.method import EsMethodConfig
from es_engine.methods.chunk_size import MOST_PROBLEMS, candidates, choose, find, most_slots
from es_engine.methods.es import EvolutionStrategies
from es_engine.spaces.base import Matrix
from es_engine.spaces.lora import LoraSpace
from workers.chunks import Chunk, ChunkResult
from workers.engine import Sampling


@pytest.mark.parametrize(
    ("population", "slots", "sizes"),
    [(64, 64, [2, 4, 8, 16, 32, 64]), (30, 30, [2, 4, 8, 16, 30]), (100, 16, [2, 4, 8, 16]), (2, 2, [2]), (1, 2, [1])],
)
def test_the_sizes_timed_are_powers_of_two_and_the_whole_population(
    population: int, slots: int, sizes: list[int]
) -> None:
    assert candidates(population, slots) == sizes


@pytest.mark.parametrize(
    ("seconds", "population", "workers", "size"),
    [
        ({2: 1.0, 4: 1.5, 8: 2.5, 16: 6.0}, 16, 1, 8),  # 8.0, 6.0, 5.0, 6.0
        ({2: 1.0, 4: 2.0, 8: 4.0}, 16, 1, 2),  # all equal: the smallest
        ({2: 1.0, 4: 1.95, 8: 3.9}, 16, 1, 2),  # 8.0, 7.8, 7.8: within 3%
        ({2: 1.0, 4: 1.5, 8: 2.5, 16: 3.0}, 16, 4, 4),  # 2.0, 1.5, 2.5, 3.0: larger ones leave workers idle
        ({2: 1.0, 3: 1.1}, 3, 1, 3),  # 2.0, 1.1
    ],
)
def test_the_size_whose_generation_ends_first_is_chosen(
    seconds: dict[int, float], population: int, workers: int, size: int
) -> None:
    assert choose(seconds, population, workers) == size


def test_slots_fit_into_a_gibibyte() -> None:
    def space(width: int) -> LoraSpace:
        return LoraSpace([Matrix("layer", width, width, 1.0)], rank=8, alpha=8)

    assert most_slots(48, space(64)) == 48
    assert most_slots(200, space(64)) == 64
    assert most_slots(200, space(1 << 19)) == (1 << 30) // (4 * 8 * 2 << 19)  # 32
    assert most_slots(200, space(1 << 22)) == 4
    assert most_slots(200, space(1 << 24)) == 2


class TimedRunner(FunctionRunner):
    """Says that a chunk took 2 seconds, and one more for every 3 members."""

    chunks: list[Chunk]

    def run(self, calls):  # type: ignore[no-untyped-def]
        self.chunks = [*getattr(self, "chunks", []), *(call.arguments[0] for call in calls)]
        results: list[ChunkResult] = super().run(calls)
        for call, result in zip(calls, results, strict=True):
            result.seconds = {"slots": 2.0, "generate": len(call.arguments[0].members) / 3}
        return results


def test_trials_are_part_of_what_a_run_asks() -> None:
    config = EsMethodConfig(population=16, sigma=0.1, prompts=MOST_PROBLEMS + 6)
    method = EvolutionStrategies(config, chunk=16, sampling=Sampling(500, stop=("\n",)))
    runner = TimedRunner(lambda theta, problem, sample: 0.0, dim=5)
    batch = problems(method.batch_size)
    assert find(method, runner, np.zeros(5, np.float32), batch, sigma=0.1, slots=16, workers=2) == 8
    for chunk in runner.chunks:
        assert {len(places) for places in chunk.problems} == {MOST_PROBLEMS}
        assert chunk.sampling.max_tokens == 64
        assert chunk.sampling.stop == ("\n",)
        assert [member.pair for member in chunk.members[::2]] == list(range(len(chunk.members) // 2))
    assert sorted({len(chunk.members) for chunk in runner.chunks}) == [2, 4, 8, 16]
