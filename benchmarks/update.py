"""The cost of an update: the weighted sum over a generation's noise, over drawing that noise once.

One thread, N = 64 mirrored members, that is 32 pairs which share their noise; the naive update holds a row for each
member. "In chunks" is the update as the engine takes it: a sum for each chunk of 16 members, added in chunk order.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Row, draw, options, report, take_turns

from es_engine import noise
from workers.perturbation import Perturber

SEED, GENERATION = 1, 2
CHUNK_PAIRS = 8
BASELINE = "draw the noise once"
Case = Callable[[], Any]


def main() -> None:
    given = options(__doc__.splitlines()[0])
    sizes = [(2_400_000, 64), (20_000_000, 16 if given.short else 64)]
    rows = [row for dim, members in sizes for row in measure(dim, members, given.repeats)]
    report("Update of one generation, one thread", rows, given)
    if given.plot is not None:
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            if row["update"] != BASELINE:
                lines.setdefault(row["update"], []).append((row["D"] / 1e6, row["over drawing"]))
        draw(given.plot, "Cost of the update", "D, millions", "time, over drawing the noise once", lines)


def measure(dim: int, members: int, repeats: int) -> list[Row]:
    memory = {name: peak_memory(name, dim, members) for name in BUILDERS}
    torch.set_num_threads(1)
    cases = {name: build(dim, members) for name, build in BUILDERS.items()}
    timings = take_turns(cases, repeats)
    kept_noise.cache_clear()
    rows = []
    for name, timing in timings.items():
        ratio = timing.over(timings[BASELINE])
        low, high = ratio.quartiles
        rows.append(
            {
                "update": name,
                "D": dim,
                "N": members,
                "seconds": timing.median,
                "over drawing": ratio.median,
                "quartiles": f"{low:.3f} to {high:.3f}",
                "peak memory, MB": memory[name],
            }
        )
    return rows


def peak_memory(name: str, dim: int, members: int) -> float:
    """Megabytes that a fresh process needs for one update, above what it has at its start."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as child:
        return child.submit(_grown_by, name, dim, members).result()


def _grown_by(name: str, dim: int, members: int) -> float:
    torch.set_num_threads(1)
    BUILDERS["from kept noise"](noise.BLOCK, 2)()  # what the libraries take on first use is not the update's
    before = _most_memory()
    BUILDERS[name](dim, members)()
    return _most_memory() - before


def _most_memory() -> float:
    """Megabytes at this process's peak; unlike getrusage's, without those of the process that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM:"))) * 1024 / 1e6


def weights(pairs: int) -> list[float]:
    return np.linspace(-1, 1, pairs).tolist()


@cache
def kept_noise(dim: int, pairs: int) -> Perturber:
    perturber = Perturber(SEED, dim, cache_bytes=4 * dim * pairs)
    for pair in range(pairs):
        perturber.eps(GENERATION, pair)
    return perturber


def drawing(dim: int, members: int) -> Case:
    room = np.empty(dim, dtype=np.float32)
    return lambda: [noise.draw(SEED, GENERATION, pair, dim, out=room) for pair in range(members // 2)]


def from_kept_noise(dim: int, members: int) -> Case:
    pairs = members // 2
    total = np.empty(dim, dtype=np.float32)
    return lambda: kept_noise(dim, pairs).noise_sum(GENERATION, range(pairs), weights(pairs), out=total)


def in_chunks(dim: int, members: int) -> Case:
    pairs = members // 2
    part = np.empty(dim, dtype=np.float32)

    def update() -> noise.Vector:
        total = np.zeros(dim, dtype=np.float32)
        for first in range(0, pairs, CHUNK_PAIRS):
            chunk = slice(first, first + CHUNK_PAIRS)
            total += kept_noise(dim, pairs).noise_sum(GENERATION, range(pairs)[chunk], weights(pairs)[chunk], out=part)
        return total

    return update


def from_seeds(dim: int, members: int) -> Case:
    pairs = members // 2
    total = np.empty(dim, dtype=np.float32)
    return lambda: Perturber(SEED, dim, cache_bytes=0).noise_sum(GENERATION, range(pairs), weights(pairs), out=total)


def naive_matmul(dim: int, members: int) -> Case:
    stored = torch.empty(members, dim)
    for member, row in enumerate(stored):
        noise.draw(SEED, GENERATION, member // 2, dim, out=row.numpy())
        row *= 1 - 2 * (member % 2)
    member_weights = torch.linspace(-1, 1, members)
    return lambda: member_weights @ stored


BUILDERS: dict[str, Callable[[int, int], Case]] = {
    BASELINE: drawing,
    "from kept noise": from_kept_noise,
    "from kept noise, in chunks": in_chunks,
    "from seeds": from_seeds,
    "naive: weights @ stored N x D": naive_matmul,
}


if __name__ == "__main__":
    main()
