"""`engine.chunk: auto`: how many members go into one engine call, found by timing a few sizes before a run begins.

More members read the base model's weights less often, until the engine is full; more than the workers can share out
evenly leave some of them idle at the end. So each size is timed on one worker, and the size is chosen for which the
whole generation would be over first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from es_engine.methods.base import CallRunner
from es_engine.methods.es import EvolutionStrategies
from es_engine.spaces.lora import LoraSpace
from workers.calls import Call
from workers.chunks import Problem

MOST_PROBLEMS = 64
MOST_TOKENS = 64
REPEATS = 2
"""The first engine call of a size also pays for what the engine sets up once."""

MOST_SLOTS = 64
MOST_SLOT_BYTES = 1 << 30
"""Slots take memory from the KV cache, and past a few dozen members an engine is full."""

NEARLY = 1.03
"""Of sizes within 3% of the best the smallest is taken: less is lost with a worker, and stragglers wait less."""


def most_slots(population: int, space: LoraSpace) -> int:
    """Slots that a worker has while its chunk size is not known: an even number, 2 at least, or one for everybody."""
    most = min(MOST_SLOTS, MOST_SLOT_BYTES // space.adapter_bytes)
    return population if population <= most else max(2, most // 2 * 2)


def candidates(population: int, slots: int) -> list[int]:
    """The sizes to be timed: powers of two from 2 on, and the whole population, as far as the slots hold them."""
    powers = {2**power for power in range(1, slots.bit_length()) if 2**power <= population}
    return sorted(powers | {population}) if population <= slots else sorted(powers)


def find(
    method: EvolutionStrategies,
    pool: CallRunner,
    theta: object,
    batch: Sequence[Problem],
    *,
    sigma: float,
    slots: int,
    workers: int,
) -> int:
    """Time the candidates around theta, version 0, and choose the size for that many workers."""
    population = method.config.population
    shared = pool.put(list(batch))
    seconds = {size: _seconds(method, pool, theta, shared, sigma, size) for size in candidates(population, slots)}
    return choose(seconds, population, workers)


def _seconds(
    method: EvolutionStrategies, pool: CallRunner, theta: object, batch: object, sigma: float, size: int
) -> float:
    """What worker 0 takes for the first `size` members, asked at most 64 problems each and answering briefly."""
    whole = method.with_chunk(size).chunks(0, sigma)[0]
    chunk = replace(
        whole,
        problems=tuple(places[:MOST_PROBLEMS] for places in whole.problems),
        sampling=replace(whole.sampling, max_tokens=min(MOST_TOKENS, whole.sampling.max_tokens)),
    )
    call = Call(f"a trial of {size} members", "evaluate", (chunk, batch, theta, 0), preferred=0)
    return min(sum(pool.run([call])[0].seconds.values()) for _ in range(REPEATS))


def choose(seconds: dict[int, float], population: int, workers: int) -> int:
    """The smallest size whose generation takes at most 3% longer than the shortest."""
    total = {size: math.ceil(math.ceil(population / size) / workers) * took for size, took in seconds.items()}
    return min(size for size, took in total.items() if took <= NEARLY * min(total.values()))
