"""Conciseness: its questions, prompts and verdicts."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from es_engine.config import ConcisenessTaskConfig, parse_config
from rewards.base import Rollout, Score, Split, VerifierSpec, as_score
from rewards.concise_questions import QUESTIONS
from rewards.conciseness import Conciseness, Template, problem_key
from rewards.problems import split_of_key

SPLITS: tuple[Split, ...] = get_args(Split)
INFO = {"question": "Say the capital of France.", "answers": ["Paris.", "Paris"]}
answers = st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=4)


def judge(completion: str, info: dict[str, Any] = INFO, **options: Any) -> Score:
    verifier = VerifierSpec("conciseness", options).load()
    return as_score(verifier(Rollout("", completion, "", info)))


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def questions(task: Conciseness, split: Split, count: int) -> set[str]:
    return {task.example(split, index).info["question"] for index in range(count)}


# Questions.


def test_the_built_in_questions_are_sound() -> None:
    assert 20 <= len(QUESTIONS) <= 40
    assert len({question for question, _ in QUESTIONS}) == len(QUESTIONS)
    for _, right in QUESTIONS:
        assert right
        assert all(answer == answer.strip() and 0 < len(answer) <= 12 for answer in right)


def test_splits_are_disjoint_and_the_same_whatever_the_seed() -> None:
    first, second = Conciseness(seed=1), Conciseness(seed=2)
    asked = {question for question, _ in QUESTIONS}
    train, heldout = (questions(first, split, 64) for split in SPLITS)
    assert train | heldout == asked
    assert heldout == {question for question in asked if split_of_key(question) == "heldout"}
    assert 5 <= len(heldout) < len(train)
    assert (train, heldout) == tuple(questions(second, split, 64) for split in SPLITS)


def test_rows_of_a_file(tmp_path: Path) -> None:
    rows = [{"question": f"q{n}", "answer": f" {n} ", "id": n} for n in range(20)]
    rows += [{"question": f"Q{n}", "answers": ["long one", str(n)]} for n in range(20)]
    held = [{"question": " q0\n", "answer": "0"}]
    task = Conciseness(data=write_rows(tmp_path / "a", rows), heldout_data=write_rows(tmp_path / "b", held))
    examples = [task.example("train", index) for index in range(39)]
    assert {example.info["question"] for example in examples} == {row["question"] for row in rows} - {"q0"}
    for example in examples:
        assert example.answer == example.info["question"][1:]
        assert problem_key(example.info) != "q0"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (7, "is not an object"),
        ({"question": " ", "answer": "a"}, "`question` is ' '"),
        ({"question": "q"}, "the right answers are [None]"),
        ({"question": "q", "answers": []}, "the right answers are []"),
        ({"question": "q", "answers": "a"}, "the right answers are 'a'"),
        ({"question": "q", "answers": ["a", " "]}, "the right answers are ['a', ' ']"),
    ],
)
def test_a_bad_row_is_named(row: Any, message: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [row])
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        Conciseness(data=path)
    assert str(caught.value).startswith(f"task.data: {path}, line 1")


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"template": "r1"}, "template"),
        ({"heldout_data": "rows.jsonl"}, "heldout_data"),
        ({"data": "absent.jsonl"}, "data"),
        ({"scale": 0.0}, "scale"),
        ({"scale": float("nan")}, "scale"),
        ({"weights": {"size": 1.0}}, "weights"),
        ({"weights": {"length": 1.0}, "verifier": "mine.py:score"}, "weights"),
    ],
)
def test_bad_settings_are_named(options: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=f"^task.{field}: "):
        Conciseness(**options)


def test_the_config_builds_the_task() -> None:
    base = {"name": "x", "model": {"source": "org/model"}, "optimizer": {"lr": 1.0}, "budget": {"generations": 1}}
    config = parse_config({**base, "task": {"kind": "conciseness", "scale": 50}})
    assert isinstance(config.task, ConcisenessTaskConfig)
    options = {"scale": 50.0, "weights": {"length": 1.0, "correct": 0.0}}
    assert config.task.build().verifier == VerifierSpec("conciseness", options)


# Prompts and worked solutions.


@pytest.mark.parametrize("template", get_args(Template))
def test_worked_solutions_are_right_and_as_short_as_can_be(template: Template) -> None:
    task = Conciseness(template=template, scale=100, weights={"length": 0.5, "correct": 0.5})
    verifier = task.verifier.load()
    for split in SPLITS:
        for index in range(20):
            example = task.example(split, index)
            text = example.prompt if example.messages is None else example.messages[0]["content"]
            assert text is not None
            assert example.info["question"] in text
            completion = task.worked_solution(example)
            assert not any(stop in completion for stop in task.stop)
            score = as_score(verifier(Rollout(text, completion, example.answer, example.info)))
            assert (score.value, score.accuracy) == (1, 1)


# Verdicts.


@given(st.text(), answers)
def test_the_default_is_the_published_reward(completion: str, right: list[str]) -> None:
    score = judge(completion, {"answers": right})
    assert score.value == -abs(len(completion) - min(len(answer) for answer in right))
    assert score.value == sum(score.components.values())
    assert score.accuracy == (completion.strip() in right)


@pytest.mark.parametrize(
    ("completion", "length", "right"),
    [("Paris", 1.0, 1), (" Paris", 0.9, 1), ("Paris.\n", 0.8, 1), ("Rome", 0.9, 0), ("It is Paris, I think", 0.0, 0)],
)
def test_with_a_scale_the_length_is_graded_from_0_to_1(completion: str, length: float, right: int) -> None:
    score = judge(completion, scale=10, weights={"length": 0.25, "correct": 0.75})
    assert score.components == pytest.approx({"length": 0.25 * length, "correct": 0.75 * right})
    assert score.value == sum(score.components.values())
    assert score.accuracy == right


@given(st.sampled_from(QUESTIONS), st.text(min_size=1))
def test_each_further_character_costs_one(row: tuple[str, tuple[str, ...]], extra: str) -> None:
    info = {"answers": list(row[1])}
    shortest = min(row[1], key=len)
    assert judge(shortest + extra, info).value == -len(extra)
    assert judge(shortest, info) == Score(0.0, {"length": 0.0, "correct": 0.0}, accuracy=1.0)
