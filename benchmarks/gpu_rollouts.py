"""Throughput of rollouts on a GPU: generated tokens a second with many members at once, over the bare model's.

The model has the shape of Qwen2.5-3B and random weights, which take as long as trained ones. Beside the engine of a run
("ours"): the bare model with torch.compile and CUDA graphs, and public ES code's way of adapter files, a member at a
time. "write" is the time that new members in all slots take, their noise drawn on one thread, over the time in which
they then generate.
"""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from engines import Engine, Kind, Load, Setup
from harness import Row, Timing, draw, options, report, take_turns

SHAPE = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
LOAD = Load(512, 128, 64)
RANK, SLOTS = 8, 32


class Case(NamedTuple):
    """Members, served in some way."""

    kind: Kind
    members: int = 1


BARE = Case("bare")
OURS = [Case("ours", members) for members in (1, 8, 16, 32)]
CASES = [BARE, *OURS, Case("files", 16)]


def main() -> None:
    given = options(__doc__.splitlines()[0], repeats=3)
    if not torch.cuda.is_available():
        raise SystemExit("gpu_rollouts.py: needs a GPU")
    with tempfile.TemporaryDirectory() as folder:
        random_model(Path(folder), "cuda")
        rows = measure(Path(folder), given.repeats)
    report("Rollouts on a GPU, a model of Qwen2.5-3B's shape", rows, given)
    if given.plot is not None:
        ours = [(row["members"], row["over bare"]) for row in rows if row["way"] == "ours"]
        draw(
            given.plot, "Rollouts beside the bare model", "members", "throughput over bare", {"ours": ours}, log_x=True
        )


def random_model(folder: Path, device: str) -> None:
    """Write a model of the shape with random weights, which reads one token a character."""
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

    vocabulary = {chr(0x4E00 + number): number for number in range(1000)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=chr(0x4E00)))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(Qwen2Config(**SHAPE), dtype=torch.bfloat16)
    model.save_pretrained(folder)


def measure(model: Path, repeats: int) -> list[Row]:
    kinds = list(dict.fromkeys(case.kind for case in CASES))
    with ThreadPoolExecutor() as starting:  # each compiles for a minute or two
        engines = dict(zip(kinds, starting.map(lambda kind: Engine(setup(model, kind)), kinds), strict=True))
    try:
        work = {f"{case}": partial(engines[case.kind].call, "generate", LOAD, case.members) for case in CASES}
        work["write"] = partial(engines["ours"].call, "write", SLOTS)
        timings = take_turns(work, repeats)
    finally:
        for engine in engines.values():
            engine.close()
    return [row(case, timings) for case in CASES]


def row(case: Case, timings: dict[str, Timing]) -> Row:
    timing = timings[f"{case}"]
    ratio = timings[f"{BARE}"].over(timing)
    low, high = ratio.quartiles
    return {
        "way": case.kind,
        "members": "" if case is BARE else case.members,
        "sequences": LOAD.sequences,
        "prompt": LOAD.prompt,
        "new": LOAD.new,
        "tokens/s": LOAD.sequences * LOAD.new / timing.median,
        "over bare": ratio.median,
        "quartiles": f"{low:.2f} to {high:.2f}",
        "write": timings["write"].over(timing).median if case == OURS[-1] else "",
    }


def setup(model: Path, kind: Kind) -> Setup:
    return Setup(
        kind,
        model,
        "bfloat16",
        RANK,
        slots=SLOTS if kind == "ours" else 1,
        max_model_len=512,
        max_num_seqs=LOAD.sequences,
        kv_cache_bytes=12 << 30,
        gpu_memory_utilization=0.2,
        pinned=False,
    )


if __name__ == "__main__":
    main()
