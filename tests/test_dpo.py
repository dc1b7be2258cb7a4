"""Direct preference optimisation: where its pairs come from, what they do, and that nobody's turn changes a bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inputs import random_center
from small_runs import (
    GENERATIONS,
    LocalPool,
    climb,
    materials_of,
    resume_here,
    small_config,
    train_and_kill,
    train_here,
    write_rows,
)
from test_runs import assert_same_run

from es_engine.config import ConfigError
from es_engine.ledger import Ledger
from es_engine.losses import dpo_loss
from workers.chunks import ChunkResult, Transcript
from workers.samples import Sample

DPO = {"kind": "dpo", "batch": 8}
PAIRS = [
    {"prompt": f"{number}+0=", "chosen": f"{number}", "rejected": "no", "id": f"row {number}"} for number in range(6)
]


def given(tmp_path: Path, **fields: Any) -> dict[str, Any]:
    return DPO | {"batch": 6, "data": write_rows(tmp_path / "pairs.jsonl", PAIRS)} | fields


def gradient_samples(pool: LocalPool) -> list[Sample]:
    """What gradients were taken on, micro-batch by micro-batch."""
    return [sample for call in pool.calls if call.method == "gradient" for sample in call.arguments[1]]


def test_given_pairs_widen_the_margin(random_llama: Path, tmp_path: Path) -> None:
    found = materials_of(random_llama, given(tmp_path, micro_batch_tokens=20))
    pool = LocalPool(found)
    _, reports = climb(found, pool, 20, lr=0.1)
    first, last = reports[0].record["learning"], reports[-1].record["learning"]
    assert first["margin"] == pytest.approx(0, abs=1e-5), "at the start, policy and reference are the same"
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert last["margin"] > 0.3
    assert last["ordered"] == 1
    assert last["loss"] < first["loss"]
    assert {report.record["pairs"] for report in reports} == {6}
    assert reports[0].costs.generated == reports[0].record["rollouts"] == 0
    assert reports[0].record["reward_mean"] is None
    # Passes by policy and base model; three pairs of two short texts are no more than a micro-batch holds.
    assert reports[0].costs.processed == 2 * sum(sample.tokens for sample in gradient_samples(pool)[:12])
    assert len(pool.calls) > len(reports)


def test_the_loss_is_that_of_the_log_probabilities_of_adapter_and_base_model(
    random_llama: Path, tmp_path: Path
) -> None:
    found = materials_of(random_llama, given(tmp_path, micro_batch_tokens=40, beta=0.3))
    pool, theta = LocalPool(found), random_center(found.space, 0.02)
    step = found.method.step(pool, theta, 0, 0.0, found.problems)
    next(step)
    with pytest.raises(StopIteration) as end:
        step.send(theta)
    learning = end.value.value.record["learning"]
    samples = gradient_samples(pool)
    assert len({call.name for call in pool.calls}) > 1
    own, base = (
        torch.tensor([row.sum() for row in pool.workers[0].logprobs(samples, at, version=0).rows])
        for at in (theta, None)
    )
    expected = dpo_loss(own[::2], own[1::2], base[::2], base[1::2], beta=0.3, normaliser=6)
    assert abs(expected.sums["margin"]) > 0.05
    assert learning["loss"] == pytest.approx(float(expected.value), rel=1e-5)
    for name in ("margin", "ordered", "chosen_reward", "rejected_reward"):
        assert learning[name] == pytest.approx(float(expected.sums[name]) / 6, rel=1e-4)


DIGITS = """
def digits(rollout):
    found = [character.isdigit() for character in rollout.completion]
    return sum(found) if found[:1] == [False] else None
"""


def test_pairs_of_rollouts_are_the_best_and_the_worst_scored_completion_of_a_prompt(
    random_llama: Path, tmp_path: Path
) -> None:
    (tmp_path / "verifier.py").write_text(DIGITS)
    task = {"verifier": f"{tmp_path}/verifier.py:digits"}
    found = materials_of(random_llama, DPO | {"samples": 6, "chunk": 8}, task=task)
    rollouts: list[Transcript] = []

    class Listening(LocalPool):
        def run(self, calls: Any) -> list[Any]:
            results = super().run(calls)
            chunks = [result for result in results if isinstance(result, ChunkResult)]
            rollouts.extend(each for chunk in chunks for row in (chunk.transcripts or [[]])[0] for each in row)
            return results

    pool = Listening(found)
    _, (report,) = climb(found, pool, 1, 0.1)
    expected = set()
    asked = found.problems("train", range(8))
    for problem, rewards, place in zip(asked, report.record["rewards"], range(0, 48, 6), strict=True):
        scored = [reward for reward in rewards if reward is not None]
        if max(scored, default=0) > min(scored, default=0):
            best, worst = rewards.index(max(scored)), rewards.index(min(scored))
            said = [tokens_of(rollouts[place + number]) for number in (best, worst)]
            expected.add((problem.prompt_ids, *said))
    samples = gradient_samples(pool)
    pairs = {
        (better.prompt_ids, better.completion_ids, worse.completion_ids)
        for better, worse in zip(samples[::2], samples[1::2], strict=True)
    }
    assert pairs == expected
    assert len(pairs) == report.record["pairs"] > 4
    assert any(None in rewards for rewards in report.record["rewards"])
    assert report.costs.generated == report.record["tokens"] > 0
    times = report.record["times"]
    worked = sum(times[phase] for phase in ("slots", "generate", "score", "learn"))
    assert worked == pytest.approx(report.costs.worker_seconds)


def tokens_of(transcript: Transcript) -> tuple[int, ...]:
    assert transcript.completion is not None
    return transcript.completion.token_ids


ROUNDED = """
def rounded(rollout):
    return 0.1 + 0.2 if rollout.completion < "M" else 0.3
"""


@pytest.mark.parametrize("rewards", ["equal", "equal but for rounding"])
def test_a_step_whose_rewards_are_all_equal_leaves_theta_alone(
    random_llama: Path, tmp_path: Path, rewards: str
) -> None:
    (tmp_path / "verifier.py").write_text(ROUNDED)
    task = {
        "equal": {"weights": {"format": 0, "numbers": 0, "solved": 0}},
        "equal but for rounding": {"verifier": f"{tmp_path}/verifier.py:rounded"},
    }[rewards]
    found = materials_of(random_llama, DPO, task=task)
    theta, (report,) = climb(found, LocalPool(found), 1, 0.1)
    np.testing.assert_array_equal(theta, found.space.start())
    values = {reward for row in report.record["rewards"] for reward in row}
    assert len(values) == (1 if rewards == "equal" else 2)
    assert (report.record["pairs"], report.record["constant_groups"], report.record["learning"]) == (0, 8, {})


def test_bad_input_is_one_sentence_before_a_worker_starts(random_llama: Path, tmp_path: Path) -> None:
    def refusal(*rows: dict[str, Any]) -> str:
        with pytest.raises(ValueError, match=r"\A[^\n]*\Z") as refused:
            materials_of(random_llama, DPO | {"data": write_rows(tmp_path / "pairs.jsonl", rows)})
        return str(refused.value)

    assert "line 2 has no `rejected`" in refusal(PAIRS[0], {"prompt": "1+2=", "chosen": "3"})
    assert "has no pairs" in refusal()
    assert "row 1 goes on after '\\n'" in refusal({**PAIRS[1], "rejected": "1\n2"})
    with pytest.raises(ConfigError, match=r"^budget\.tokens: got 1000, .*, for dpo generates no tokens$"):
        small_config(random_llama, given(tmp_path), budget={"generations": None, "tokens": 1000})
    assert small_config(random_llama, DPO, budget={"generations": None, "tokens": 1000}).budget.tokens == 1000


def test_two_workers_and_kill_9_lead_to_the_same_theta(random_llama: Path, tmp_path: Path) -> None:
    method = DPO | {"micro_batch_tokens": 64, "chunk": 4}
    one, two = (small_config(random_llama, method, pool={"workers": workers}) for workers in (1, 2))
    whole = train_here(one, tmp_path / "whole")
    assert len(Ledger(whole / "ledger.jsonl").generations) == GENERATIONS
    assert_same_run(train_here(two, tmp_path / "two"), whole)
    killed = train_and_kill(two, tmp_path / "killed", calls=10)
    assert 0 < len(Ledger(killed / "ledger.jsonl").generations) < GENERATIONS
    assert_same_run(resume_here(killed), whole)
