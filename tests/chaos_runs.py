"""Runs of simulated workers for faults to be brought about in, on whatever Ray cluster this process has joined."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from es_engine.config import Config, parse_config
from es_engine.ledger import Ledger, LedgerReader, first_difference
from es_engine.trainer import train

GENERATIONS = 6
CHUNKS = 8
PATIENCE_S = 300.0
"""For the first generations: of a start, engine and all, beside others on two slow cores."""


def config_of(model: Path, workers: Any, *, rank: int = 4, step_ms: float = 5.0, **pool_fields: Any) -> Config:
    """A run of seconds, one worker a process."""
    return parse_config(
        {
            "name": "chaos",
            "model": {"source": str(model)},
            "space": {"rank": rank},
            "method": {"population": 2 * CHUNKS, "sigma": 0.3, "prompts": 3},
            "optimizer": {"kind": "adam", "lr": 0.1},
            "task": {"template": "plain", "high": 9, "max_tokens": 16},
            "pool": {"workers": workers, **pool_fields},
            "engine": {
                "kind": "simulated",
                "chunk": 2,
                "answer_tokens": 10.0,
                "step_ms": step_ms,
                "stragglers": 0.0,
                "workers_per_process": 1,
            },
            "budget": {"generations": GENERATIONS},
            "evaluation": {"every": 3, "problems": 8, "chunk": 4},
            "telemetry": {"console": False, "tensorboard": False},
        }
    )


def train_and(config: Config, run: Path, event: Callable[[], None]) -> Path:
    """Train, and have something happen as soon as the first generation is in the run's ledger. It happens in this
    thread, the main one, as a node's joining has to, and the run goes on in another."""
    reader, lines, deadline = LedgerReader(run / "ledger.jsonl"), 0, time.monotonic() + PATIENCE_S
    with ThreadPoolExecutor(1) as executor:
        training = executor.submit(train, config, run)
        while lines < 2 and not training.done():
            assert time.monotonic() < deadline
            lines += len(list(reader.new_lines()))
            time.sleep(0.02)
        event()
        return training.result().path


def stall_of_unharmed(run: Path, undisturbed: Path) -> float:
    """By how many seconds the slowest generation took longer than the median, of a run that ended as the one to which
    nothing happened."""
    assert first_difference(run / "ledger.jsonl", undisturbed / "ledger.jsonl") is None
    mine, theirs = ((folder / "adapter/adapter_model.safetensors").read_bytes() for folder in (run, undisturbed))
    assert mine == theirs
    seconds = [line["times"]["total"] for line in Ledger(run / "ledger.jsonl").generations]
    return max(seconds) - statistics.median(seconds)
