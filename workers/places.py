"""How many workers a run has and the places that a cluster has for them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from es_engine.config import Config, PoolConfig, SimulatedEngineConfig

Nodes = Mapping[str, Mapping[str, float]]
"""The resources of living nodes, by id."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker runs: a node and, on CPU, some of the cores its processes may use.

    Workers of a node with the same number `shared` are threads of one process and take no CPU; None is a process of its
    own.
    """

    node: str
    cores: tuple[int, ...] | None = None
    gpus: int = 0
    shared: int | None = None


def bounds(pool: PoolConfig) -> tuple[int, float]:
    """The fewest workers that a run goes on with, and the most that it uses."""
    if pool.workers == "auto":
        return 1, math.inf
    if isinstance(pool.workers, int):
        return pool.workers, pool.workers
    return pool.workers.min, pool.workers.max


def bundles(pool: PoolConfig, on_gpu: bool) -> list[dict[str, float]]:
    """What the most workers take together, each its share of one node; nothing where `pool.workers` sets no bounds."""
    if isinstance(pool.workers, int | str):
        return []
    gpus = {"GPU": float(pool.tensor_parallel)} if on_gpu else {}
    return [{"CPU": float(pool.threads), **gpus} for _ in range(pool.workers.max)]


def plan_places(config: Config, nodes: Nodes, on_gpu: bool) -> list[Place]:
    """All places that nodes of these resources have for workers, node by node."""
    pool = config.pool
    by_cpu = {node: int(nodes[node].get("CPU", 0)) // pool.threads for node in sorted(nodes)}
    if isinstance(config.engine, SimulatedEngineConfig):
        if isinstance(pool.workers, int):
            return _shared_places(list(by_cpu), pool.workers, config.engine.workers_per_process)
        share = config.engine.workers_per_process
        return [Place(node, shared=seat // share) for node, room in by_cpu.items() for seat in range(room)]
    if on_gpu:
        room = {
            node: min(most, int(nodes[node].get("GPU", 0)) // pool.tensor_parallel) for node, most in by_cpu.items()
        }
        return [Place(node, gpus=pool.tensor_parallel) for node, seats in room.items() for _ in range(seats)]
    return [
        Place(node, tuple(range(seat * pool.threads, (seat + 1) * pool.threads)))
        for node, seats in by_cpu.items()
        for seat in range(seats)
    ]


def free_places(places: Sequence[Place], taken: Sequence[Place]) -> list[Place]:
    """The places that are not taken, in their order; the same one may be there for several."""
    left, free = Counter(taken), []
    for place in places:
        left[place] -= 1
        if left[place] < 0:
            free.append(place)
    return free


def _shared_places(nodes: Sequence[str], workers: int, per_process: int) -> list[Place]:
    """Places for workers that only sleep, dealt out evenly to as few processes as hold them; none without a node."""
    if not nodes:
        return []
    processes = math.ceil(workers / per_process)
    return [Place(nodes[worker % processes % len(nodes)], shared=worker % processes) for worker in range(workers)]
