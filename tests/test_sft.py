"""Supervised fine-tuning: what it learns from, its gradient, and runs that come out the same whatever happens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from command_line import refusal
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
    write_config,
    write_rows,
)
from test_runs import assert_same_run
from transformers import AutoModelForCausalLM

from es_engine.config import ConfigError, load_config
from es_engine.ledger import Ledger
from rewards.countdown import Countdown
from workers.completions import load_completions
from workers.engine import Vector
from workers.samples import Sample

SFT = {"kind": "sft", "batch": 16}
ROWS = [{"prompt": f"{number}+0=", "completion": f"{number}", "id": f"row {number}"} for number in range(6)]


def demonstrations(model: Path, count: int, split: Any = "heldout") -> list[Sample]:
    """Worked solutions of Countdown."""
    task = materials_of(model, SFT).task
    assert isinstance(task, Countdown)
    completions = load_completions(model, task.stop, "task")
    examples = [task.example(split, number) for number in range(count)]
    return [completions.sample(completions.problem(each), task.worked_solution(each)) for each in examples]


def mean_logprob(pool: LocalPool, samples: list[Sample], theta: Vector | None) -> float:
    rows = pool.workers[0].logprobs(samples, theta, version=1000).rows
    return float(np.concatenate(rows).mean())


def test_worked_solutions_make_those_of_heldout_problems_likelier(random_llama: Path) -> None:
    found = materials_of(random_llama, SFT)
    pool = LocalPool(found)
    theta, reports = climb(found, pool, 40, lr=0.2)
    nll = [report.record["learning"]["nll"] for report in reports]
    heldout = demonstrations(random_llama, 32)
    before, after = mean_logprob(pool, heldout, None), mean_logprob(pool, heldout, theta)
    assert nll[0] == pytest.approx(-before, rel=0.2)
    assert nll[-1] < 0.6 * nll[0]
    assert after > 0.6 * before
    assert reports[1].record["prompts"] == [found.task.example("train", number).id for number in range(16, 32)]
    assert reports[0].costs.generated == 0
    assert reports[0].record["times"]["learn"] == reports[0].costs.worker_seconds > 0
    assert reports[0].costs.processed == sum(sample.tokens for sample in demonstrations(random_llama, 16, "train"))


def test_the_gradient_is_that_of_transformers_with_prompts_masked(random_llama: Path, tmp_path: Path) -> None:
    found = materials_of(random_llama, SFT, task={"template": "few_shot", "numbers": [2, 3, 4]})
    theta = random_center(found.space, 0.02)
    step = found.method.step(LocalPool(found), theta, 0, 0.0, found.problems)
    direction = next(step)
    with pytest.raises(StopIteration) as end:
        step.send(theta)

    task, completions = found.task, load_completions(random_llama, ("\n",), "task")
    assert isinstance(task, Countdown)
    batch = [task.example("train", number) for number in range(16)]
    samples = [completions.sample(completions.problem(each), task.worked_solution(each)) for each in batch]
    ids, labels = torch.zeros(2, 16, max(sample.tokens for sample in samples), dtype=torch.int64)
    labels -= 100
    for row, sample in enumerate(samples):
        ids[row, : sample.tokens] = torch.tensor(sample.prompt_ids + sample.completion_ids)
        labels[row, len(sample.prompt_ids) : sample.tokens] = torch.tensor(sample.completion_ids)
    found.space.save(theta, tmp_path, str(random_llama))
    base = AutoModelForCausalLM.from_pretrained(random_llama, dtype=torch.float32)
    reference = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True).eval()
    attended = torch.arange(ids.shape[1]) < torch.tensor([sample.tokens for sample in samples])[:, None]
    loss = reference(input_ids=ids, attention_mask=attended.long(), labels=labels).loss
    loss.backward()
    expected = np.concatenate(
        [
            place.scale
            * reference.get_submodule(f"base_model.model.{place.matrix.name}")
            .lora_B["default"]
            .weight.grad.numpy()
            .ravel()
            for place in found.space.placements
        ]
    )
    learning = end.value.value.record["learning"]
    norm = np.linalg.norm(expected)
    assert norm > 1
    assert [learning["nll"], learning["loss"]] == pytest.approx([loss.item()] * 2, rel=1e-6)
    assert learning["norm"] == pytest.approx(norm, rel=1e-5)
    np.testing.assert_allclose(-direction * norm, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_rows_of_a_file_come_once_an_epoch_in_an_order_of_the_runs_seed(random_llama: Path, tmp_path: Path) -> None:
    method = {"kind": "sft", "batch": 4, "data": write_rows(tmp_path / "rows.jsonl", ROWS)}

    def order(**top: Any) -> list[str]:
        found = materials_of(random_llama, method, **top)
        pool = LocalPool(found)
        return [name for report in climb(found, pool, 3, 0.0)[1] for name in report.record["prompts"]]

    seen = order()
    assert sorted(seen[:6]) == sorted(seen[6:]) == [row["id"] for row in ROWS]
    assert seen[:6] != seen[6:]
    assert order() == seen


def test_a_problem_without_a_solution_is_left_out(random_llama: Path, tmp_path: Path) -> None:
    rows = [{"numbers": [a, b], "target": target} for a in (1, 2, 3) for b in (1, 2) for target in (a + b, 50 + a)]
    held = [{"numbers": [9, 9], "target": 18}]
    task = {
        "data": write_rows(tmp_path / "task.jsonl", rows),
        "heldout_data": write_rows(tmp_path / "held.jsonl", held),
    }
    found = materials_of(random_llama, {"kind": "sft", "batch": len(rows)}, task=task)
    _, (report,) = climb(found, LocalPool(found), 1, 0.0)
    assert len(report.record["prompts"]) == len(rows) // 2
    assert not any(int(name.partition("=")[2]) >= 50 for name in report.record["prompts"])


def test_bad_input_is_one_sentence_before_a_worker_starts(random_llama: Path, tmp_path: Path) -> None:
    def refusal(data: str | None, **axes: dict[str, Any]) -> str:
        with pytest.raises(ValueError, match=r"\A[^\n]*\Z") as refused:
            materials_of(random_llama, {"kind": "sft", "data": data}, **axes)
        return str(refused.value)

    path = tmp_path / "rows.jsonl"
    assert refusal("no.jsonl") == f"method.data: no file {Path.cwd() / 'no.jsonl'}"
    assert "line 1 has no `completion`" in refusal(write_rows(path, [{"prompt": "1+2="}]))
    assert "line 2 has no `completion`" in refusal(write_rows(path, [ROWS[0], {"prompt": "1", "chosen": "2"}]))
    assert "has no demonstrations" in refusal(write_rows(path, []))
    assert "row 1 has 607 tokens" in refusal(write_rows(path, [{**ROWS[1], "completion": "1" * 602}]))
    unsolved = [{"numbers": [number, 1], "target": 90} for number in range(1, 9)]
    task = {"data": write_rows(tmp_path / "task.jsonl", unsolved)}
    assert "the task knows no solution of its first 32 problems" in refusal(None, task=task)
    budget = {"generations": None, "tokens": 1000}
    with pytest.raises(ConfigError, match=r"^budget\.tokens: got 1000, .*, for sft generates no tokens$"):
        small_config(random_llama, SFT, budget=budget)
    assert small_config(random_llama, SFT, budget=budget | {"flops": 1e9}).budget.tokens == 1000


def test_a_relative_path_to_data_starts_beside_the_config(random_llama: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", ROWS)
    path = tmp_path / "config.yaml"
    path.write_text(
        "name: small\nmodel: {source: org/model}\nmethod: {kind: sft, data: rows.jsonl}\noptimizer: {lr: 1}\n"
        "task: {kind: countdown}\nbudget: {generations: 1}\n"
    )
    assert load_config(path).method.model_dump()["data"] == str(tmp_path / "rows.jsonl")
    kept = load_config(path, ["method.data=hub:org/rows"]).method
    assert kept.model_dump()["data"] == "hub:org/rows"


def test_two_workers_and_kill_9_lead_to_the_same_theta(random_llama: Path, tmp_path: Path) -> None:
    one, two = (
        small_config(random_llama, SFT | {"micro_batch_tokens": 64}, evaluation={"every": 2}, pool={"workers": workers})
        for workers in (1, 2)
    )
    whole = train_here(one, tmp_path / "whole")
    assert len(Ledger(whole / "ledger.jsonl").generations) == GENERATIONS
    assert_same_run(train_here(two, tmp_path / "two"), whole)
    killed = train_and_kill(two, tmp_path / "killed", calls=9)
    assert 0 < len(Ledger(killed / "ledger.jsonl").generations) < GENERATIONS
    assert_same_run(resume_here(killed), whole)


def test_a_missing_file_ends_the_command_and_leaves_nothing(random_llama: Path, tmp_path: Path) -> None:
    config = write_config(small_config(random_llama, SFT | {"data": str(tmp_path / "no.jsonl")}), tmp_path / "c.yaml")
    assert refusal("train", config, "--run-dir", tmp_path / "run") == f"method.data: no file {tmp_path / 'no.jsonl'}"
    assert not (tmp_path / "run").exists()
