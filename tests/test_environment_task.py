"""Games of one's own environment, and of kind guess, as configs name them and the command line shows them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from es_engine import scoring
from es_engine.cli import app
from es_engine.config import ConfigError, SingleTurnTaskConfig, load_config, load_task, parse_config, task_kinds
from rewards.environment_task import EnvironmentTask
from rewards.environments import EnvironmentSpec
from rewards.guess import Guess

ENVIRONMENT = """
from rewards.environments import Turn

class Riddle:
    def __init__(self, tries=2):
        self.max_turns = tries

    def reset(self, example):
        return {"answer": example.answer, "hint": example.info["hint"]}

    def step(self, state, completion):
        right = completion == state["answer"]
        return Turn(state, "Yes." if right else state["hint"], {"solved": float(right)}, done=right, solved=right)

class Nothing:
    pass
"""
ROWS: list[dict[str, Any]] = [
    {"prompt": f"Riddle {number}:", "answer": number, "hint": "No.", "worked": ["hm", str(number)]}
    for number in range(20)
]


def write_lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with an environment, its games and a config that names both by relative paths."""
    (tmp_path / "riddles.py").write_text(ENVIRONMENT)
    write_lines(tmp_path / "riddles.jsonl", *ROWS)
    (tmp_path / "riddles.yaml").write_text(
        "name: riddles\nmodel: {source: org/model}\noptimizer: {kind: sgd, lr: 1.0}\nbudget: {generations: 1}\n"
        "task: {kind: environment, environment: 'riddles.py:Riddle', options: {tries: 3}, data: riddles.jsonl}\n"
    )
    return tmp_path


# Tasks


def test_a_config_names_an_environment_of_ones_own(folder: Path) -> None:
    task = load_config(folder / "riddles.yaml", ["task.max_tokens=7"]).task.build()
    assert isinstance(task, EnvironmentTask)
    assert task.environment == EnvironmentSpec(f"{folder / 'riddles.py'}:Riddle", {"tries": 3})
    assert task.environment.load().max_turns == 3
    assert task.verifier.options == {"environment": task.environment.name, "options": {"tries": 3}}
    assert (task.max_tokens, task.stop) == (7, ())
    numbers = {split: {task.example(split, index).answer for index in range(40)} for split in ("train", "heldout")}
    assert numbers["train"] | numbers["heldout"] == {str(number) for number in range(20)}
    assert not numbers["train"] & numbers["heldout"]
    example = task.example("train", 0)
    assert example.prompt == f"Riddle {example.answer}:"
    assert example.info in ROWS


def test_rows_have_names_answers_and_chats(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    data = write_lines(tmp_path / "train.jsonl", {"id": 7, "messages": chat}, {"prompt": "p"})
    heldout = write_lines(tmp_path / "heldout.jsonl", {"prompt": "q", "answer": "a"})
    task = EnvironmentTask(environment="guess", data=data, heldout_data=heldout)
    examples = {example.id: example for example in (task.example("train", index) for index in range(2))}
    named = examples.pop("7")
    assert (named.prompt, named.messages, named.answer) == (None, tuple(chat), "")
    (unnamed,) = examples.values()
    assert (unnamed.prompt, unnamed.messages, unnamed.id) == ("p", None, unnamed.id)
    held = task.example("heldout", 0)
    assert task.worked_policy(held)([{"role": "user", "content": "q"}]) == "a"
    with pytest.raises(ValueError, match=r"task.data: the row 7 has neither `worked`, .*, nor `answer`"):
        task.worked_policy(named)


def test_games_are_the_same_by_what_is_in_them_and_not_by_their_numbers(tmp_path: Path) -> None:
    games = [{"id": number, "prompt": "Open my lock.", "answer": str(100 + number)} for number in range(4)]
    others = [{"id": number, "prompt": "Open my lock.", "answer": str(200 + number)} for number in range(2)]
    data = write_lines(tmp_path / "train.jsonl", *games, {**others[0], "id": None})
    heldout = write_lines(tmp_path / "heldout.jsonl", *others)
    task = EnvironmentTask(environment="guess", data=data, heldout_data=heldout)
    answers = {split: {task.example(split, index).answer for index in range(8)} for split in ("train", "heldout")}
    assert answers == {"train": {"100", "101", "102", "103"}, "heldout": {"200", "201"}}


def test_games_that_open_alike_are_told_apart_by_what_is_hidden(tmp_path: Path) -> None:
    games = [{"id": number, "prompt": "Open my lock.", "code": number // 2} for number in range(6)]
    heldout = write_lines(tmp_path / "heldout.jsonl", *games)
    data = write_lines(tmp_path / "train.jsonl", {"prompt": "Open my lock.", "code": 9})
    task = EnvironmentTask(environment="guess", data=data, heldout_data=heldout)
    examples = [task.example("heldout", number) for number in range(6)]
    assert len({example.problem for example in examples}) == 3
    assert all(
        (one.problem == other.problem) == (one.info["code"] == other.info["code"])
        for one in examples
        for other in examples
    )


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("text", "line 2 is not an object with either `prompt` or `messages`"),
        ({"answer": "a"}, "line 2 is not an object with either `prompt` or `messages`"),
        ({"prompt": "p", "messages": []}, "line 2 is not an object with either `prompt` or `messages`"),
        ({"prompt": 3}, "line 2: `prompt` is 3; accepted is text"),
        ({"messages": []}, "line 2: `messages` is []; accepted is"),
        ({"messages": [{"role": "user"}]}, "line 2: `messages` is [{'role': 'user'}]; accepted is"),
        ({"prompt": "p", "worked": ["a", 1]}, "line 2: `worked` is ['a', 1]; accepted is a list of texts"),
    ],
)
def test_a_row_that_is_none_is_named(tmp_path: Path, row: Any, sentence: str) -> None:
    data = write_lines(tmp_path / "data.jsonl", ROWS[0], row)
    with pytest.raises(ValueError, match="^task.data: .*" + re.escape(sentence)):
        EnvironmentTask(environment="guess", data=data)


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("{}/no.py:Riddle", {}, "environment: no file "),
        ("{}/riddles.py:Ridle", {}, "has no function 'Ridle'"),
        ("{}/riddles.py:Riddle", {"turns": 3}, "does not take these options (got an unexpected keyword argument"),
        ("{}/riddles.py:Nothing", {}, "Nothing has no reset; it needs reset, step and max_turns"),
        ("no.such.module:Riddle", {}, "environment: 'no.such.module' cannot be imported"),
    ],
)
def test_an_environment_that_is_none_is_refused(
    folder: Path, name: str, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=r"^environment: ") as caught:
        EnvironmentSpec(name.format(folder), options).load()
    assert sentence in str(caught.value)


def test_the_guessing_game_is_a_task_of_a_config() -> None:
    task = load_task("guess", ["task.span=10", "task.weights.solved=2"]).build()
    assert isinstance(task, Guess)
    assert task.environment.options == {
        "turns": 4,
        "template": "chat",
        "weights": {"format": 0.1, "narrowed": 0.3, "solved": 2.0},
    }


@pytest.mark.parametrize("field", ["verifier=mine.py:score", "reward={right: {of: accuracy}}"])
def test_a_game_has_no_verifier_and_no_parts(field: str) -> None:
    sentence = rf"^task\.{field.partition('=')[0]}: got .*, accepted is nothing: a game is scored by its environment"
    with pytest.raises(ConfigError, match=sentence):
        load_task("guess", [f"task.{field}"])


def test_a_simulated_engine_plays_no_games() -> None:
    axes = {"name": "x", "model": {"source": "m"}, "optimizer": {"lr": 1.0}, "budget": {"generations": 1}}
    with pytest.raises(ConfigError, match=r'^task.kind: got "guess", accepted is a task of one turn while engine.kind'):
        parse_config({**axes, "task": {"kind": "guess"}, "engine": {"kind": "simulated"}})


def test_only_tasks_of_one_turn_are_scored_from_a_file(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", {"prompt": "p", "completion": "c"})
    with pytest.raises(ValueError, match=r"^task.kind: guess is a game of several turns, .* by eval or train$"):
        scoring.score_file(load_task("guess"), source, tmp_path / "out.jsonl")
    single = {kind for kind, model in task_kinds().items() if issubclass(model, SingleTurnTaskConfig)}
    assert set(task_kinds()) - single == {"guess", "environment"}


# The command line


def test_a_game_is_shown_played_well_and_deaf(folder: Path) -> None:
    (first, *_), guesses = scoring.graded(load_task(str(folder / "riddles.yaml"))), scoring.graded(load_task("guess"))
    assert first.right == f"hmNo.{first.example.answer}Yes."
    assert (first.right_score.accuracy, first.wrong_score.accuracy) == (1, 0)
    assert re.fullmatch(r"hmNo.(\d+)No.\1No.", first.wrong)
    assert len(guesses) == scoring.SHOWN
    assert all(each.right_score.value == pytest.approx(1) for each in guesses)
    assert all(each.wrong_score.accuracy == 0 for each in guesses)


def test_an_environment_that_cannot_be_loaded_is_shown_by_its_error(folder: Path) -> None:
    changes = ["--set", "task.options.turns=3"]
    result = CliRunner().invoke(app, ["tasks", "--show", str(folder / "riddles.yaml"), *changes])
    assert "does not take these options" in str(result.exception)
