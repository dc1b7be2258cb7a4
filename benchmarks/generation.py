"""A whole generation of ES: where its time goes, and what the same one takes in the ways of public ES code.

The first table is the loop of a run itself on one worker: Ray, driver, verifier process, ledger and telemetry, from
one generation's end to the next one's. What a worker does for the next chunk while it generates, drawing noise and
writing slots, is part of "generate", whose core it shares; `swap.py` says what it takes. The second has the ways take
turns, each in a process of its own on one thread of the same core, at the same members, prompts and verifier; the
public ways bring in, ask and score a member at a time, and draw the noise again for the update. Its engines are set up
as in `rollouts.py`. The short form has fewer prompts and rounds, and tries the ways with the tiny model alone.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from engines import LEGEND, Engine, Kind, Setup
from harness import Row, draw_bars, options, report, take_turns
from rollouts import MODELS, Model

from es_engine import load_config, past, trainer
from es_engine.ledger import Ledger
from es_engine.methods.es import EvolutionStrategies
from es_engine.run_folder import RunFolder
from es_engine.session import Session, gather
from es_engine.telemetry import open_telemetry

MEMBERS, CHUNK = 16, 16
BLOCK_SIZE = 32
"""Of every way's KV cache, the engine's own choice on a CPU, so that all share what prompts begin with alike."""
WAYS: tuple[Kind, ...] = ("ours", "stock", "merged", "files")


def main() -> None:
    given = options(__doc__.splitlines()[0])
    prompts, repeats = (2, min(3, given.repeats)) if given.short else (32, given.repeats)
    given = replace(given, repeats=repeats)
    split = [row for model in MODELS for row in phases(model, prompts, repeats)]
    report(f"One worker's generation of {MEMBERS} members x {prompts} prompts, by phase", split, given)
    others = replace(given, json=given.json and given.json.with_stem(f"{given.json.stem}-ways"))
    models = MODELS[-1:] if given.short else MODELS
    rows = [row for model in models for row in ways(model, prompts, repeats)]
    report("The same generation, by way", rows, others)
    print(LEGEND)
    if given.plot is not None:
        bars = {model.name: {r["way"]: r["over ours"] for r in rows if r["model"] == model.name} for model in models}
        draw_bars(given.plot, f"A generation of {MEMBERS} members x {prompts} prompts", "time over ours", bars)


def config_of(model: Model, prompts: int, *overrides: str) -> Any:
    work = [f"method.population={MEMBERS}", f"method.prompts={prompts}", f"engine.chunk={CHUNK}"]
    return load_config(model.config[0], [*model.config[1:], *work, *overrides])


def phases(model: Model, prompts: int, repeats: int) -> list[Row]:
    """Median seconds of each phase over `repeats` generations of a run, after one to warm up."""
    config = config_of(model, prompts, "pool.workers=1", f"budget.generations={1 + repeats}", "telemetry.console=false")
    found = []
    with (
        tempfile.TemporaryDirectory() as folder,
        Session(config, print) as session,
        open_telemetry(config, RunFolder(Path(folder)), 0, session.pool) as telemetry,
    ):
        ledger, state = Ledger(Path(folder) / "ledger.jsonl"), past.beginning(session.materials)
        for _ in range(1 + repeats):
            started = time.perf_counter()
            trainer._generation(session, RunFolder(Path(folder)), ledger, state, telemetry)
            found.append(by_phase(ledger.lines[-1]["times"], time.perf_counter() - started))
    seconds = {phase: statistics.median(times[phase] for times in found[1:]) for phase in found[0]}
    shares = {phase: [times[phase] / times["all"] for times in found[1:]] for phase in found[0]}
    return [
        {
            "model": model.name,
            "phase": phase,
            "ms": 1000 * seconds[phase],
            "share": statistics.median(shares[phase]),
            "from": f"{min(shares[phase]):.4f} to {max(shares[phase]):.4f}",
        }
        for phase in seconds
    ]


def by_phase(times: dict[str, float], wall: float) -> dict[str, float]:
    """Seconds of a generation by phase, from its ledger line's times and its whole duration."""
    return {
        "slots": times["slots"],
        "generate": times["generate"],
        "awaiting scores": times["score"],
        "dispatch": times["rollouts"] - times["slots"] - times["generate"] - times["score"],
        "noise sums": times["update"],
        "batch, step, ledger, telemetry": wall - times["rollouts"] - times["update"],
        "outside generate": wall - times["generate"],
        "all": wall,
    }


def ways(model: Model, prompts: int, repeats: int) -> list[Row]:
    """Whole generations by way, in turns."""
    materials = gather(config_of(model, prompts))
    method = materials.method
    assert isinstance(method, EvolutionStrategies)
    problems, sampling = materials.problems("train", range(prompts)), method.chunks(0, 0.0)[0].sampling
    engines: dict[Kind, Engine] = {}
    try:
        for kind in WAYS:
            engines[kind] = Engine(setup(model, materials.model, kind))
            engines[kind].call("take_on", problems, sampling, materials.task.verifier, method.config.sigma)
        work = {kind: partial(engine.call, "whole_generation", MEMBERS) for kind, engine in engines.items()}
        timings = take_turns(work, repeats)  # type: ignore[arg-type]
    finally:
        for engine in engines.values():
            engine.close()
    rows = []
    for kind in WAYS:
        ratio = timings[kind].over(timings[WAYS[0]])
        low, high = ratio.quartiles
        rows.append(
            {
                "model": model.name,
                "way": kind,
                "seconds": timings[kind].median,
                "over ours": ratio.median,
                "quartiles": f"{low:.2f} to {high:.2f}",
            }
        )
    return rows


def setup(model: Model, folder: Path, kind: Kind) -> Setup:
    return Setup(
        kind,
        folder,
        model.dtype,
        rank=8,
        slots=CHUNK if kind in ("ours", "stock") else 1,
        max_model_len=model.max_model_len,
        max_num_seqs=model.max_num_seqs,
        kv_cache_bytes=model.kv_cache_bytes,
        block_size=BLOCK_SIZE,
    )


if __name__ == "__main__":
    main()
