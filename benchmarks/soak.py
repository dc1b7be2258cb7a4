"""A long run with a worker killed (kill -9) again and again: does anything grow?

Simulated workers, one a process, under the real driver and pool on a local Ray cluster. As the run goes on, the memory
and the open files of the driver, the processes that it and Ray have started, and the Ray objects that it holds are
counted, and the last third of the run is held against the middle one: by how much it may be above is in `BOUNDS`.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import ray
from harness import Row, draw_panels, options, report

from es_engine import load_config, train
from es_engine.ledger import Ledger, LedgerReader

CONFIG = Path(__file__).parent.parent / "configs" / "countdown_tiny.yaml"
OVERRIDES = [
    "model.steps=50",
    "method={population: 16, prompts: 4, sigma: 0.1}",
    "engine={kind: simulated, chunk: 2, workers_per_process: 1, answer_tokens: 10, step_ms: 2}",
    "task.max_tokens=16",
    "pool={workers: 2, start_timeout_s: 120}",
    "telemetry={console: false, tensorboard: false}",
]
KILL_EVERY_S = 30.0
SAMPLE_EVERY_S = 2.0
BOUNDS = {"memory (MiB)": 32.0, "open files": 4.0, "processes": 2.0, "Ray objects": 4.0}
"""Most that the median of the run's last third may be above that of its middle third."""


def main() -> None:
    given = options(__doc__.splitlines()[0])
    generations, every = (150, 10.0) if given.short else (2000, KILL_EVERY_S)
    samples, kills, restarts = soak(generations, every)
    third = len(samples) // 3
    rows: list[Row] = []
    for name, bound in BOUNDS.items():
        parts = samples[third : 2 * third], samples[2 * third :]
        middle, last = (statistics.median(each[name] for each in part) for part in parts)
        within = "yes" if last - middle <= bound else "NO"
        rows.append({"what": name, "middle third": middle, "last third": last, "bound": bound, "within": within})
    report(f"{generations} generations, {kills} workers killed, {restarts} replaced", rows, given)
    if given.plot is not None:
        lines = {name: [(each["generation"], each[name]) for each in samples] for name in BOUNDS}
        draw_panels(given.plot, f"A run with a worker killed every {every:g} s", "generation", lines)


def soak(generations: int, every: float) -> tuple[list[Row], int, int]:
    """Samples of a run, how many workers were killed in it, and how many the pool replaced."""
    samples: list[Row] = []
    kills = 0
    over = threading.Event()

    def kill_workers() -> None:
        nonlocal kills
        rng = random.Random(0)
        while not over.wait(every):
            workers = [process for process in descendants() if "ray::SimulatedWorkers" in command(process)]
            if workers:
                with suppress(ProcessLookupError):  # it has just ended
                    os.kill(rng.choice(workers), signal.SIGKILL)
                    kills += 1

    def sample() -> None:
        reader, done = LedgerReader(run / "ledger.jsonl"), 0
        while not over.wait(SAMPLE_EVERY_S):
            done += len(list(reader.new_lines()))
            if done:
                samples.append({"generation": done - 1, **count()})

    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        threads = [threading.Thread(target=work) for work in (kill_workers, sample)]
        for thread in threads:
            thread.start()
        try:
            train(load_config(CONFIG, [*OVERRIDES, f"budget={{generations: {generations}}}"]), run)
        finally:
            over.set()
            for thread in threads:
                thread.join()
        return samples, kills, Ledger(run / "ledger.jsonl").generations[-1]["restarts"]


def count() -> Row:
    """What this process and its descendants hold."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    held = ray._private.worker.global_worker.core_worker.get_all_reference_counts() if ray.is_initialized() else {}
    return {
        "memory (MiB)": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        "open files": len(os.listdir("/proc/self/fd")),
        "processes": sum(1 for _ in descendants()),
        "Ray objects": len(held),
    }


def descendants() -> Iterator[int]:
    """The processes that this one has started, and those that they have."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            continue
        children.setdefault(parent, []).append(int(entry.name))
    todo = list(children.get(os.getpid(), []))
    while todo:
        process = todo.pop()
        yield process
        todo += children.get(process, [])


def command(process: int) -> str:
    """A process's command line; empty if it has ended."""
    try:
        return Path(f"/proc/{process}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


if __name__ == "__main__":
    main()
