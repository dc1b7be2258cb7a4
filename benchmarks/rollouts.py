"""Throughput of rollouts: generated tokens a second with many members at once, over the bare model's.

Beside the engine of a run ("ours"): the bare model, vLLM's own LoRA arithmetic ("stock"), and the two ways of public
ES code, a member at a time. For those two, bringing the member in belongs to the work; slots are written while the
chunk before generates, and `swap.py` says what that costs. All are on one thread, as the workers of a run are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from engines import LEGEND, Engine, Kind, Load, Setup
from harness import Options, Row, Timing, draw, options, report, take_turns

from es_engine import load_config
from workers.sources import local_model

TINY = ("configs/countdown_tiny.yaml", "model.steps=60")
SMOLLM2 = ("configs/countdown_smollm2.yaml",)


@dataclass(frozen=True, slots=True)
class Model:
    """A model, the load its bars are stated for, and how an engine of it is set up."""

    name: str
    config: tuple[str, ...]
    load: Load
    dtype: str
    max_num_seqs: int
    max_model_len: int = 256
    kv_cache_bytes: int = 1 << 30


@dataclass(frozen=True, slots=True)
class Case:
    """Members of a rank, served in some way."""

    kind: Kind
    rank: int = 8
    members: int = 16


PUBLIC: tuple[Kind, ...] = ("files", "merged")
BARE = (Case("bare"), Case("bare, eager"))


@dataclass(frozen=True, slots=True)
class Cell:
    """Cases measured beside the bare model under one load."""

    load: Load
    cases: tuple[Case, ...]
    bare: tuple[Case, ...] = BARE


MODELS = (
    Model("SmolLM2-135M, bfloat16", SMOLLM2, Load(256, 24, 32), "bfloat16", 256),
    Model("tiny 1M, float32", TINY, Load(512, 24, 16), "float32", 512, kv_cache_bytes=256 << 20),
)


def main() -> None:
    given = options(__doc__.splitlines()[0])
    if given.short:
        given = replace(given, repeats=min(3, given.repeats))
    rows = [row for model in MODELS for row in measure(model, given)]
    report("Rollouts on one thread", rows, given)
    print(LEGEND)
    if given.plot is not None:
        draw_members(given.plot, rows)


def cells(model: Model, *, short: bool) -> list[Cell]:
    """What is measured. The short form, most of which is the start of engines and above all the compilation of bare
    ones, has a quarter of the sequences and of the tokens; it has no sweeps, and of the ways of public code only files,
    with as many prompts a member and fewer members, for the first model."""
    whole = model.load
    if short:
        sequences, prompt, new = whole.sequences // 4, whole.prompt // 4, whole.new // 4
        ours = Cell(Load(sequences, prompt, new), (Case("ours"), Case("ours", members=32)), BARE[:1])
        files = Cell(Load(sequences // 4, prompt, new), (Case("files", members=4),), BARE[:1])
        return [ours, files] if model is MODELS[0] else [ours]
    members = tuple(Case("ours", 8, count) for count in (1, 2, 4, 8, 16, 32))
    ranks = tuple(Case("ours", rank, count) for rank in (1, 16) for count in (8, 16, 32))
    stock = (Case("stock", 8, 8), Case("stock", 8, 16))
    public = tuple(Case(kind) for kind in PUBLIC)
    some = (Case("ours"), Case("stock"), *public)
    loads = [
        *(Load(sequences, whole.prompt, whole.new) for sequences in (whole.sequences // 4, 4 * whole.sequences)),
        *(Load(whole.sequences, prompt, whole.new) for prompt in (8, 96)),
        *(Load(whole.sequences, whole.prompt, new) for new in (whole.new // 4, 4 * whole.new)),
    ]
    return [Cell(whole, (*members, *ranks, *stock, *public)), *(Cell(load, some) for load in loads)]


def measure(model: Model, given: Options) -> list[Row]:
    folder = local_model(load_config(model.config[0], list(model.config[1:])))
    engines: dict[tuple[Kind, int], Engine] = {}
    try:
        return [
            row
            for cell in cells(model, short=given.short)
            for row in measure_cell(model, folder, cell, engines, given.repeats)
        ]
    finally:
        for engine in engines.values():
            engine.close()


def measure_cell(
    model: Model, folder: Path, cell: Cell, engines: dict[tuple[Kind, int], Engine], repeats: int
) -> list[Row]:
    cases = (*cell.bare, *cell.cases)
    for case in cases:
        if (case.kind, case.rank) not in engines:
            engines[case.kind, case.rank] = Engine(setup(model, folder, case))
    work = {
        str(case): partial(engines[case.kind, case.rank].call, "generate", cell.load, case.members) for case in cases
    }
    timings = take_turns(work, repeats)
    return [row(model, cell.load, case, timings[str(case)], timings[str(cases[0])]) for case in cases]


def setup(model: Model, folder: Path, case: Case) -> Setup:
    slots = {"ours": 32, "stock": 16}.get(case.kind, 1)
    return Setup(
        case.kind,
        folder,
        model.dtype,
        case.rank,
        slots,
        max_model_len=model.max_model_len,
        max_num_seqs=model.max_num_seqs,
        kv_cache_bytes=model.kv_cache_bytes,
    )


def row(model: Model, load: Load, case: Case, timing: Timing, bare: Timing) -> Row:
    ratio = bare.over(timing)
    low, high = ratio.quartiles
    is_bare = case.kind in ("bare", "bare, eager")
    return {
        "model": model.name,
        "way": case.kind,
        "rank": "" if is_bare else case.rank,
        "members": "" if is_bare else case.members,
        "prompts a member": "" if is_bare else load.sequences // case.members,
        "sequences": load.sequences,
        "prompt": load.prompt,
        "new": load.new,
        "tokens/s": load.sequences * load.new / timing.median,
        "over bare": ratio.median,
        "quartiles": f"{low:.2f} to {high:.2f}",
    }


def draw_members(file: Path, rows: list[Row]) -> None:
    """Throughput over the bare model's against the number of members, under each model's own load."""
    lines: dict[str, list[tuple[float, float]]] = {}
    first = {model.name: next(row for row in rows if row["model"] == model.name) for model in MODELS}
    for row in rows:
        main_load = all(row[key] == first[row["model"]][key] for key in ("sequences", "prompt", "new"))
        if main_load and row["members"]:
            name = f"{row['model'].split(',')[0]}, {row['way']}, rank {row['rank']}"
            lines.setdefault(name, []).append((row["members"], row["over bare"]))
    draw(file, "Rollouts beside the bare model", "members", "throughput over bare", lines, log_x=True)


if __name__ == "__main__":
    main()
