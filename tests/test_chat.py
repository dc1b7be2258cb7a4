"""The chat task: its prompts, and a reward model's scores on the whole way from a file to the ledger."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from reward_models import own_logits
from typer.testing import CliRunner

from es_engine import scoring
from es_engine.cli import app
from es_engine.config import ChatTaskConfig, ConfigError, load_config, load_task, parse_config
from es_engine.ledger import Ledger
from rewards.base import VerifierSpec
from rewards.chat import Chat, Template
from rewards.problems import split_of_key

ROWS = [{"prompt": f"{number}+{number}=", "answer": str(2 * number)} for number in range(30)]
CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "3+4"}]
RUN: dict[str, Any] = {
    "name": "chat",
    "model": {"source": "org/model"},
    "space": {"rank": 2, "alpha": 4.0},
    "method": {"population": 4, "sigma": 1e-6, "prompts": 3},  # all members answer as the base model does
    "optimizer": {"lr": 0.1},
    "engine": {"kind": "hf", "dtype": "float32", "device": "cpu", "chunk": 2},
    "pool": {"workers": 1},
    "budget": {"generations": 1},
    "evaluation": {"problems": 4},
}


def write_rows(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat(tmp_path: Path, rows: Sequence[Any] = ROWS, **options: Any) -> Chat:
    return Chat(data=write_rows(tmp_path / "rows.jsonl", rows), **{"verifier": "mine.py:score", **options})


# Prompts.


def test_prompts_are_text_or_a_chat_under_either_name(tmp_path: Path) -> None:
    held = [{"messages": CHAT, "id": 7}, {"prompt": CHAT}, {"prompt": "3+4"}]
    task = chat(tmp_path, heldout_data=write_rows(tmp_path / "heldout.jsonl", held), system="be kind")
    examples = [task.example("heldout", index) for index in range(3)]
    assert [len(example.messages) for example in examples] == [2, 2, 2]
    assert sorted(example.messages[0]["content"] for example in examples) == ["be brief", "be brief", "be kind"]
    assert all(example.messages[1] == CHAT[1] for example in examples)
    assert {example.answer for example in examples} == {""}
    assert next(example.info for example in examples if example.id == "7") == held[0]


def test_splits_share_no_prompt_whatever_its_system_message_and_spacing(tmp_path: Path) -> None:
    twins = [{"prompt": [CHAT[0], {"role": "user", "content": f" {row['prompt']}\n"}]} for row in ROWS]
    task = chat(tmp_path, [*ROWS, *twins])
    asked = {
        split: {task.example(split, index).messages[-1]["content"].strip() for index in range(60)}
        for split in ("train", "heldout")
    }
    assert asked["train"] | asked["heldout"] == {row["prompt"] for row in ROWS}
    assert asked["heldout"] == {row["prompt"] for row in ROWS if split_of_key(f"user: {row['prompt']}") == "heldout"}
    assert not asked["train"] & asked["heldout"]


def test_a_plain_prompt_is_the_text_as_it_stands(tmp_path: Path) -> None:
    task = chat(tmp_path, [{**row, "prompt": f" {row['prompt']}\n"} for row in ROWS], template="plain")
    example = task.example("train", 0)
    assert example.prompt == example.info["prompt"]
    assert (example.messages, task.stop, task.max_tokens) == (None, (), 512)
    assert task.worked_solution(example) == example.info["answer"]


def test_other_columns_can_be_named(tmp_path: Path) -> None:
    rows = [{"prompt": 3, "said": f"q{number}", "reply": "a"} for number in range(30)]
    task = chat(tmp_path, rows, fields={"prompt": "said", "answer": "reply"})
    example = task.example("train", 0)
    assert example.messages == ({"role": "user", "content": example.info["said"]},)
    assert example.answer == "a"


def test_without_an_answer_there_is_no_worked_solution(tmp_path: Path) -> None:
    task = chat(tmp_path, [{"prompt": row["prompt"]} for row in ROWS])
    with pytest.raises(ValueError, match="has no answer, and no other is known"):
        task.worked_solution(task.example("train", 0))


@pytest.mark.parametrize(
    ("row", "template", "sentence"),
    [
        ("text", "chat", "line 1 is not an object with `prompt` or `messages`"),
        ({"question": "q"}, "chat", "line 1 is not an object with `prompt` or `messages`"),
        ({"prompt": " "}, "chat", "line 1: `prompt` is ' '; accepted is text or a list of messages of which the last"),
        ({"messages": []}, "chat", "line 1: `messages` is []; accepted is"),
        ({"messages": [*CHAT, {"role": "assistant", "content": "7"}]}, "chat", "the last is the user's"),
        ({"messages": [{"role": "tool", "content": "x"}, *CHAT]}, "chat", "line 1: `messages` is"),
        ({"messages": [{"role": "user"}]}, "chat", "line 1: `messages` is [{'role': 'user'}]; accepted is"),
        ({"prompt": CHAT}, "plain", "; accepted is text"),
        ({"prompt": "q", "answer": 3}, "chat", "line 1: `answer` is 3; accepted is text or nothing"),
    ],
)
def test_a_bad_row_is_named(row: Any, template: Template, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        chat(tmp_path, [row], template=template)
    assert str(caught.value).startswith(f"task.data: {tmp_path / 'rows.jsonl'}, line 1")


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"template": "r1"}, "template"),
        ({"template": "plain", "system": "be kind"}, "system"),
        ({"fields": {"question": "q"}}, "fields"),
        ({"verifier": None}, "reward_model"),
        ({"verifier": None, "reward_model": "/no/such/folder"}, "reward_model"),
    ],
)
def test_bad_settings_are_named(options: dict[str, Any], field: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^task.{field}: "):
        chat(tmp_path, **options)


# Who scores.


def test_a_verifier_of_the_users_takes_the_place_of_the_reward_model(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    task = load_task("chat", [f"task.data={data}", f"task.reward_model={tmp_path}", "task.output=1"])
    options = {"model": str(tmp_path), "max_length": 2048, "output": 1, "device": "cpu"}
    assert task.build().verifier == VerifierSpec("reward_model", options)
    task = load_task("chat", [f"task.data={data}", f"task.reward_model={tmp_path}", "task.verifier=package.mine:score"])
    assert task.build().verifier == VerifierSpec("package.mine:score")


def test_parts_may_score_alone_or_beside_the_reward_model(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    length = "task.reward.length={verifier: length, options: {free: 2, most: 4}}"
    alone = load_task("chat", [f"task.data={data}", length]).build().verifier
    assert [part["verifier"] for part in alone.options["parts"]] == ["length"]
    part = f"task.reward.liked={{verifier: reward_model, options: {{model: {tmp_path}}}}}"
    alone = load_task("chat", [f"task.data={data}", part]).build().verifier
    assert [(part["verifier"], part["options"]) for part in alone.options["parts"]] == [
        ("reward_model", {"model": str(tmp_path)})
    ]
    both = [f"task.data={data}", f"task.reward_model={tmp_path}", "task.reward.liked={}", length]
    parts = load_task("chat", both).build().verifier.options["parts"]
    assert [(part["name"], part["verifier"]) for part in parts] == [("liked", "reward_model"), ("length", "length")]
    assert parts[0]["options"]["model"] == str(tmp_path)


@pytest.mark.parametrize("overrides", [[], ["task.reward.own={}"]])
def test_where_nothing_scores_one_sentence_says_so(overrides: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^task\.reward_model: got null, accepted is a model, unless .*$"):
        load_task("chat", ["task.data=rows.jsonl", *overrides])


def test_a_reward_model_is_found_beside_the_config(tmp_path: Path) -> None:
    (tmp_path / "judge").mkdir()
    task = {"kind": "chat", "data": "rows.jsonl", "reward_model": "judge"}
    part = {"verifier": "reward_model", "options": {"model": "judge", "output": 1}}
    (tmp_path / "config.yaml").write_text(json.dumps({**RUN, "task": {**task, "reward": {"other": part}}}))
    found = load_config(tmp_path / "config.yaml").task
    assert isinstance(found, ChatTaskConfig)
    assert found.reward_model == str(tmp_path / "judge")
    assert found.reward is not None
    assert found.reward["other"].options == {"model": str(tmp_path / "judge"), "output": 1}
    hub = parse_config({**RUN, "task": {**task, "reward_model": "org/judge"}}).task
    assert isinstance(hub, ChatTaskConfig)
    assert hub.reward_model == "org/judge"


# The whole way.


def test_prompts_are_shown_with_the_answers_that_they_have(classifier: Path, tmp_path: Path) -> None:
    rows = [row if number % 2 else {"prompt": row["prompt"]} for number, row in enumerate(ROWS)]
    command = ["tasks", "--show", "chat", "--set", f"task.data={write_rows(tmp_path / 'rows.jsonl', rows)}"]
    result = CliRunner().invoke(app, [*command, "--set", f"task.reward_model={classifier}"])
    assert result.exit_code == 0, result.output
    assert result.output.count("[user] ") == 5
    assert "right: none known" in result.output
    assert re.search(r"right: '\d+'\n  reward -?\d\.\d+, accuracy none\n", result.output)


def test_a_reward_model_is_in_memory_once_when_completions_are_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    spec = VerifierSpec("reward_model", {"model": "org/judge"})
    total = VerifierSpec("sum", {"parts": [{"name": "liked", "verifier": "reward_model"}]})
    others = VerifierSpec("sum", {"parts": [{"name": "short", "verifier": "length"}]})
    assert [scoring._processes(each, 100) for each in (spec, total, others, VerifierSpec("math"))] == [1, 1, 8, 8]


@pytest.mark.ray
def test_rewards_in_the_ledger_are_the_classifiers_own_logits(
    classifier: Path, random_llama: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from es_engine.trainer import train

    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    task = {"kind": "chat", "template": "plain", "data": data, "reward_model": str(classifier), "max_tokens": 6}
    config = parse_config({**RUN, "model": {"source": str(random_llama)}, "task": task})
    run = train(config, tmp_path / "run")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(random_llama), AutoTokenizer.from_pretrained(random_llama)

    def answered(prompt: str) -> str:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        output = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
        return prompt + tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)

    prompts = [config.task.build().example("train", index).prompt for index in range(3)]
    expected = [own_logits(classifier, answered(prompt or ""))[0] for prompt in prompts]
    (generation,) = Ledger(tmp_path / "run/ledger.jsonl").generations
    assert generation["rewards"] == [pytest.approx(expected, abs=1e-5)] * 4
    assert len(set(expected)) == 3
    samples = [json.loads(line) for line in (run.path / "samples/step-000000.jsonl").read_text().splitlines()]
    assert len(samples) == 4
    for row in samples:
        logits = own_logits(classifier, row["prompt"] + row["completion"])
        assert row["reward"] == pytest.approx(logits[0], abs=1e-5)
