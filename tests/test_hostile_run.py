"""A whole run whose completions are out to harm it: each costs itself its score, and all of them are counted."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from es_engine import session
from es_engine.config import Config, SimulatedEngineConfig, parse_config
from es_engine.ledger import Ledger
from es_engine.report import read_run
from es_engine.trainer import train
from workers.actor import Worker, WorkerSetup
from workers.calls import Call
from workers.engine import Completion, Request, Sampling
from workers.scoring import open_scorer
from workers.simulated_engine import SimulatedEngine

VERIFIER = """
import ctypes, os, time

def mine(rollout):
    match rollout.completion:
        case "fork":
            return 0.25 if os.fork() else time.sleep(1000)
        case "sleep":
            time.sleep(1000)
        case "allocate":
            return float(len(bytearray(10 * 10**9)))
        case "print":
            print("{}\\\\n" * 10_000, flush=True)
        case "exit":
            raise SystemExit
        case "segfault":
            ctypes.string_at(0)
    return 0.0
"""

TEXTS = ["9**9**9", "(" * 500_000 + ")" * 500_000, "1\0+\0", "7" * 10**5, "1\ud800+\udfff2", "1+1"]
COMPLETIONS = [*TEXTS, "fork", "sleep", "allocate", "print", "exit", "segfault"]
FAILURES = {"timeout": 1, "out of memory": 1, "exception": 1, "died": 1}


class HostileEngine(SimulatedEngine):
    """Answers request number i with completion number i."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Completion]:
        for completion in super().generate(requests, sampling):
            yield replace(completion, text=COMPLETIONS[completion.request % len(COMPLETIONS)])


class HostileWorker(Worker):
    """A worker with that engine and the real scorer."""

    def start(self) -> dict[str, Any]:
        config = self._setup.config
        assert isinstance(config.engine, SimulatedEngineConfig)
        self._engine = HostileEngine(config.engine, config.seed, self._setup.space.dim)
        self._scorer = open_scorer(config.task, config.task.build().verifier)
        return {}

    def stop(self) -> None:
        self._scorer.close()


class InlinePool:
    """One worker in this process, used as a `Pool` is."""

    size = 1
    restarts = speculative = 0

    def __init__(self, setup: WorkerSetup, _notify: object) -> None:
        self._worker = HostileWorker(setup, 0, None)
        self._worker.start()

    def count_anew(self) -> None:
        """There is nothing to count."""

    def put(self, value: Any) -> Any:
        return value

    def run(self, calls: Sequence[Call]) -> list[Any]:
        return [getattr(self._worker, call.method)(*call.arguments) for call in calls]

    def close(self) -> None:
        self._worker.stop()


def config_with(verifier: Path, model: Path) -> Config:
    """Of ES on a reward that is a sum of the task's own and of `mine` in the file of a verifier."""
    return parse_config(
        {
            "name": "hostile",
            "model": {"source": str(model)},
            "space": {"rank": 4},
            "method": {"population": 4, "sigma": 0.3, "prompts": 6},
            "optimizer": {"kind": "adam", "lr": 0.1},
            "task": {
                "template": "plain",
                "high": 9,
                "max_tokens": 16,
                "deadline": 0.5,
                "memory_gb": 1.0,
                "reward": {"right": {}, "mine": {"verifier": f"{verifier}:mine"}},
            },
            "engine": {"kind": "simulated", "chunk": 2, "answer_tokens": 10.0, "step_ms": 0.1},
            "budget": {"generations": 2},
            "evaluation": {"every": 2, "problems": 12, "chunk": 12},
        }
    )


def test_a_run_outlives_hostile_completions_and_counts_them(
    random_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "Pool", InlinePool)
    (tmp_path / "mine.py").write_text(VERIFIER)
    folder = train(config_with(tmp_path / "mine.py", random_llama), tmp_path / "run").path
    generations = Ledger(folder / "ledger.jsonl").generations
    assert [line["step"] for line in generations] == [0, 1]
    for line in generations:  # four members of six prompts: every completion twice
        assert line["failures"] == {"mine": {kind: 2 * count for kind, count in FAILURES.items()}}
        assert line["unscored"] == 8
        for scored, unscored in zip(line["rewards"][::2], line["rewards"][1::2], strict=True):
            assert None not in scored
            assert [reward is None for reward in unscored] == [False, True, True, False, True, True]
            assert unscored[0] == pytest.approx(0.25)  # the verifier that forked
    for step, evaluation in zip((0, 2), Ledger(folder / "eval.jsonl").lines, strict=True):
        assert (evaluation["step"], evaluation["failures"]) == (step, {"mine": FAILURES})
        samples = (folder / "samples" / f"step-{step:06d}.jsonl").read_text().splitlines()
        assert [json.loads(line)["completion"] for line in samples] == COMPLETIONS


def test_rollouts_of_which_a_part_has_no_score_are_not_unscored(
    random_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "Pool", InlinePool)
    (tmp_path / "mine.py").write_text("def mine(rollout):\n    return None\n")
    folder = train(config_with(tmp_path / "mine.py", random_llama), tmp_path / "run").path
    for line in Ledger(folder / "ledger.jsonl").generations:
        assert (line["rollouts"], line["unscored"], line["failures"]) == (24, 0, {"mine": {"no score": 24}})
    run = read_run(folder)
    assert (run.unscored, run.failures) == (0, {"mine: no score": 48})
    assert run.figures["unscored"].tolist() == [0, 0]
