"""How rollouts scale: up to 256 simulated workers under the real driver and pool, and two real ones over one.

Simulated workers sleep (`workers/simulated_engine.py`), so their number is limited by the driver alone. Adapters have
20 million numbers. A worker is busy while it carries out a chunk. "While there is work" leaves out the end of a
generation, when nothing waits any more; how much of a generation that is depends on its stragglers, so there is also
the makespan of ideal list scheduling: the same chunks in the same order, each begun the moment a worker is free.
"""

from __future__ import annotations

import heapq
import math
import multiprocessing
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness import Options, Row, draw, options, report

from es_engine import load_config, train
from es_engine.ledger import Ledger
from es_engine.methods.es import EvolutionStrategies
from es_engine.methods.rollouts import evaluate
from es_engine.session import Session
from workers.chunks import ChunkResult

CONFIG = Path(__file__).parent.parent / "configs" / "countdown_tiny.yaml"
SIGMA = 0.1
TINY = ["model.steps=50", "evaluation.problems=16"]
SIMULATED = [*TINY, "space.rank=3008", "task.max_tokens=200", "method.prompts=8", f"method.sigma={SIGMA}"]
MEMBERS_PER_WORKER = 16
SAMPLE_S = 0.1
TURNS = 3


def main() -> None:
    given = options(__doc__.splitlines()[0])
    sizes = [1, 256] if given.short else [1, 4, 16, 64, 256]
    rows = [alone(rollouts, workers, 1 if given.short else given.repeats) for workers in sizes]
    report("Simulated workers, rollouts of a generation", rows, given)
    report("256 simulated workers, one whole run", [alone(whole_run)], part(given, "run"))
    report("Real vLLM workers, tiny model", real(given), part(given, "real"))
    if given.plot is not None:
        columns = ("busy while there is work", "busy in all", "busy ideally")
        lines = {column: [(row["workers"], row[column]) for row in rows] for column in columns}
        draw(given.plot, "Simulated workers: busy share of their time", "workers", "share", lines, log_x=True)


def part(given: Options, name: str) -> Options:
    """The same options with a JSON file of its own for another table."""
    return given if given.json is None else replace(given, json=given.json.with_stem(f"{given.json.stem}-{name}"))


def alone(case: Callable[..., Any], *arguments: Any) -> Any:
    """What a case returns in a process of its own, whose Ray, CPU time and memory are its own too."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as child:
        return child.submit(case, *arguments).result()


# --- simulated workers


def rollouts(workers: int, generations: int) -> Row:
    """Generations with eight chunks for each worker, a mirrored pair each: 4,096 members for 256 workers."""
    population = MEMBERS_PER_WORKER * workers
    config = load_config(CONFIG, [*SIMULATED, *simulated(workers, chunk=2), f"method.population={population}"])
    with Session(config, print) as session, peaks() as peak:
        method, pool = evolution(session), session.pool
        theta = pool.put(session.materials.space.start())
        problems = session.materials.problems("train", range(method.batch_size))
        found = []
        for number in range(generations):
            started, cpu = time.perf_counter(), time.process_time()
            results = evaluate(pool, method.chunks(number, SIGMA), problems, theta, version=0)
            found.append(shares(results, workers, time.perf_counter() - started, time.process_time() - cpu))
    medians = {name: statistics.median(row[name] for row in found) for name in found[0]}
    return {"workers": workers, "members": population, **medians, "driver, GiB": peak.own / 2**30}


def evolution(session: Session) -> EvolutionStrategies:
    assert isinstance(session.materials.method, EvolutionStrategies)
    return session.materials.method


def simulated(workers: int, chunk: int) -> list[str]:
    return [f"engine={{kind: simulated, chunk: {chunk}}}", f"pool.workers={workers}"]


def shares(results: Sequence[ChunkResult], workers: int, wall: float, cpu: float) -> dict[str, float]:
    """The shares of the workers' time that they are busy in a generation's rollouts, and what those cost the driver;
    `wall` and its `cpu` time are in seconds."""
    waited = sum(result.seconds["waited"] for result in results)
    chunks = [sum(result.seconds.values()) - result.seconds["waited"] for result in results]
    ideal = makespan(chunks, workers)
    return {
        "chunk, s": statistics.median(chunks),
        "generation, s": wall,
        "busy while there is work": sum(chunks) / (sum(chunks) + waited),
        "busy in all": sum(chunks) / workers / wall,
        "busy ideally": sum(chunks) / workers / ideal,
        "over ideal time": wall / ideal,
        "driver ms a call": 1000 * cpu / len(chunks),
    }


def makespan(seconds: Sequence[float], workers: int) -> float:
    """When the last of these jobs is done if each in turn is begun by whichever worker is free first."""
    free = [0.0] * workers
    for job in seconds:
        heapq.heapreplace(free, free[0] + job)
    return max(free)


def whole_run() -> Row:
    """A generation of 256 chunks of 16 members, with its update, as `es-engine train` runs it."""
    population = 256 * MEMBERS_PER_WORKER
    overrides = [*SIMULATED, *simulated(256, chunk=16), f"method.population={population}", "budget.generations=1"]
    config = load_config(CONFIG, overrides)
    with tempfile.TemporaryDirectory() as folder, peaks() as peak:
        train(config, Path(folder) / "run")
        ledger = Ledger(Path(folder) / "run" / "ledger.jsonl")
    (line,), vector = ledger.generations, 4 * ledger.header["dim"]
    sums = len(line["chunks"])
    return {
        "D, millions": ledger.header["dim"] / 1e6,
        "members": population,
        "sums": sums,
        "sums, GiB": sums * vector / 2**30,
        "rollouts, s": line["times"]["rollouts"],
        "update, s": line["times"]["update"],
        "driver, GiB": peak.own / 2**30,
        "driver grew by, vectors": (peak.own - peak.start) / vector,
        "mapped of the object store, vectors": peak.shared / vector,
    }


@dataclass(slots=True)
class Peaks:
    """Most bytes of this process's own memory, what it had at the start, and most of the object store's pages that it
    has in its address space."""

    start: int
    own: int
    shared: int = 0


@contextmanager
def peaks() -> Iterator[Peaks]:
    """Watch this process's memory; `own` and `shared` are right when the block is over."""
    own, shared = resident()
    found, over = Peaks(own, own, shared), threading.Event()

    def watch() -> None:
        while not over.wait(SAMPLE_S):
            own, shared = resident()
            found.own, found.shared = max(found.own, own), max(found.shared, shared)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    yield found
    over.set()
    watcher.join()


def resident() -> tuple[int, int]:
    """Bytes of this process's memory: its own, and pages shared with others (proc(5), status)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, files, shared = (int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile", "RssShmem"))
    return own + files, shared


# --- real workers


def real(given: Options) -> list[Row]:
    """One worker and two in turn, each time in a new pool on the same generations; tokens a second."""
    turns = [1, 2] if given.short else [1, 2, 2, 1] * math.ceil(TURNS / 2)
    speeds: dict[int, list[float]] = {1: [], 2: []}
    for workers in turns:
        speeds[workers].append(alone(speed, workers, 2 if given.short else given.repeats))
    ratios = [two / one for one, two in zip(speeds[1], speeds[2], strict=True)]
    return [
        {
            "workers": workers,
            "tokens/s": statistics.median(speeds[workers]),
            "over one": 1.0 if workers == 1 else statistics.median(ratios),
            "from": "" if workers == 1 else f"{min(ratios):.3f} to {max(ratios):.3f}",
        }
        for workers in speeds
    ]


def speed(workers: int, generations: int) -> float:
    """Tokens a second, the median of generations with their updates, after one to warm up."""
    config = load_config(CONFIG, [*TINY, f"pool.workers={workers}"])
    with Session(config, print) as session:
        method = evolution(session)
        theta = session.pool.put(session.materials.space.start())
        problems = session.materials.problems("train", range(method.batch_size))
        speeds = []
        for generation in range(1 + generations):
            started = time.perf_counter()
            record = method.estimate(
                session.pool, theta, 0, problems, generation, 0.3, session.materials.space.dim
            ).record
            speeds.append(record["tokens"] / (time.perf_counter() - started))
    return statistics.median(speeds[1:])


if __name__ == "__main__":
    main()
