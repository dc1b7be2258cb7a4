"""The cost of new members: seconds to fill k slots with theta + sigma*eps, by way, over drawing the noise alone.

Every way draws the noise itself. Two of them write and read adapter files, in a temporary folder.
"""

from __future__ import annotations

from functools import partial

from engines import Engine, Kind, Setup
from harness import Options, Row, draw, options, report, take_turns
from rollouts import MODELS, Model

from es_engine import load_config
from workers.sources import local_model

DRAW = "the noise alone"
WAYS: dict[str, tuple[Kind, str]] = {
    DRAW: ("ours", "draw"),
    "written in memory (the engine's)": ("ours", "write"),
    "LoRAModel from tensors, added to vLLM's manager": ("files", "from_tensors"),
    "files, load_inplace": ("files", "load_in_place"),
    "files, a new name each": ("files", "save_and_load"),
    "merged into packed weights, one after another": ("merged", "write"),
}


def main() -> None:
    given = options(__doc__.splitlines()[0])
    counts = (8,) if given.short else (1, 2, 4, 8, 16, 32)
    rows = [row for model in MODELS for row in measure(model, counts, given)]
    report("New members", rows, given)
    if given.plot is not None:
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            if row["model"] == MODELS[0].name:
                lines.setdefault(row["way"], []).append((row["members"], row["ms a member"]))
        draw(given.plot, f"New members of {MODELS[0].name}", "members", "ms a member", lines, log_x=True)


def measure(model: Model, counts: tuple[int, ...], given: Options) -> list[Row]:
    folder = local_model(load_config(model.config[0], list(model.config[1:])))
    kinds: tuple[Kind, ...] = ("ours", "files", "merged")
    engines = {
        kind: Engine(
            Setup(
                kind,
                folder,
                model.dtype,
                rank=8,
                slots=max(counts),
                max_model_len=model.max_model_len,
                max_num_seqs=model.max_num_seqs,
                kv_cache_bytes=model.kv_cache_bytes,
            )
        )
        for kind in kinds
    }
    try:
        return [row for members in counts for row in measure_count(model, members, engines, given)]
    finally:
        for engine in engines.values():
            engine.close()


def measure_count(model: Model, members: int, engines: dict[Kind, Engine], given: Options) -> list[Row]:
    timings = take_turns(
        {way: partial(engines[kind].call, method, members) for way, (kind, method) in WAYS.items()}, given.repeats
    )
    rows = []
    for way, timing in timings.items():
        ratio = timing.over(timings[DRAW])
        low, high = ratio.quartiles
        rows.append(
            {
                "model": model.name,
                "members": members,
                "way": way,
                "ms a member": timing.median / members * 1e3,
                "over the noise": ratio.median,
                "quartiles": f"{low:.2f} to {high:.2f}",
            }
        )
    return rows


if __name__ == "__main__":
    main()
