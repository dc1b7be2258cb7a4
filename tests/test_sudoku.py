"""Sudoku: its settings, prompts, files and verdicts."""

from __future__ import annotations

import inspect
import json
import re
import time
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from published_sudoku import DATA, FILES, lines, obeys_the_rules

from es_engine.config import SudokuTaskConfig, parse_config
from rewards.base import Rollout, Score, Split, VerifierSpec, as_score
from rewards.problems import stream
from rewards.sudoku import WEIGHTS, Sudoku, Template, sudoku_verifier
from rewards.sudoku_grids import MAX_BLANKS, SIZES, keeps, parse, random_puzzle, to_line, to_rows
from rewards.sudoku_prompts import PLAIN_ALPHABET

SPLITS: tuple[Split, ...] = get_args(Split)
PUZZLE, SOLUTION = "1..4.4..2.4..3.1", "1234341221434321"
INFO = {"puzzle": PUZZLE, "solution": SOLUTION}


def judge(completion: str, form: Template = "plain", info: dict[str, Any] = INFO, **options: Any) -> Score:
    verifier = VerifierSpec("sudoku", {"form": form, **options}).load()
    return as_score(verifier(Rollout("", completion, info["solution"], info)))


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("size", {"size": 6}),
        ("blanks", {"blanks": (0, 4)}),
        ("blanks", {"blanks": (5, 4)}),
        ("blanks", {"blanks": (4, MAX_BLANKS[4] + 1)}),
        ("blanks", {"size": 9, "blanks": (4, MAX_BLANKS[9] + 1)}),
        ("template", {"template": "poem"}),
        ("heldout_data", {"heldout_data": "rows.jsonl"}),
        ("data", {"data": "none.jsonl"}),
        ("weights", {"weights": {"numbers": 1.0}}),
        ("weights", {"weights": {"cells": -1.0}}),
        ("weights", {"verifier": "mine.py:score", "weights": {"cells": 1.0}}),
    ],
)
def test_what_makes_no_sense_is_refused_by_field(field: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^task.{field}: "):
        Sudoku(**options)


# Prompts and worked solutions.


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("template", get_args(Template))
def test_every_template_has_a_prompt_and_a_solution_its_verifier_accepts(template: Template, size: Any) -> None:
    task = Sudoku(template=template, size=size)
    verifier = task.verifier.load()
    for split in SPLITS:
        for index in range(20):
            example = task.example(split, index)
            assert (example.prompt is None) != (example.messages is None)
            completion = task.worked_solution(example)
            score = as_score(verifier(Rollout("", completion, example.answer, example.info)))
            assert score.value == pytest.approx(1)
            assert score.accuracy == 1
            assert len(completion) < task.max_tokens


@pytest.mark.parametrize("size", SIZES)
def test_a_plain_line_keeps_to_its_alphabet(size: Any) -> None:
    task = Sudoku(template="plain", size=size)
    for index in range(50):
        example = task.example("train", index)
        assert example.prompt is not None
        assert set(example.prompt + task.worked_solution(example)) <= set(PLAIN_ALPHABET)
        assert set(task.stop) <= set(PLAIN_ALPHABET)


def test_a_chat_shows_the_grid_row_by_row() -> None:
    example = Sudoku(template="chat").example("train", 0)
    assert example.messages is not None
    assert f"\n\n{to_rows(parse(example.id))}\n\n" in example.messages[0]["content"]


# Files.


def test_a_file_of_lines_is_solved_and_split() -> None:
    for name in FILES:
        task = Sudoku(size=9, data=DATA / name)
        seen = {split: {task.example(split, index).id for index in range(30)} for split in SPLITS}
        assert not seen["train"] & seen["heldout"]
        assert seen["train"] | seen["heldout"] == set(lines(name))
        example = task.example("train", 0)
        assert obeys_the_rules(parse(example.answer))
        assert keeps(parse(example.answer), parse(example.id))


def test_puzzles_of_a_heldout_file_are_left_out_of_training(tmp_path: Path) -> None:
    heldout = tmp_path / "heldout.txt"
    heldout.write_text("\n".join(line.replace(".", "0") for line in lines(FILES[0])[:5]))
    task = Sudoku(size=9, data=DATA / FILES[0], heldout_data=heldout)
    assert {task.example("heldout", index).id for index in range(5)} == set(lines(FILES[0])[:5])
    assert {task.example("train", index).id for index in range(15)} == set(lines(FILES[0])[5:])


def rows_4x4() -> list[dict[str, Any]]:
    task = Sudoku()
    return [{**task.example(split, index).info, "level": index} for split in SPLITS for index in range(10)]


def as_lists(line: str) -> list[list[int]]:
    return [list(parse(line)[start : start + 4]) for start in (0, 4, 8, 12)]


@pytest.mark.parametrize("as_list", [False, True])
def test_json_rows(tmp_path: Path, as_list: bool) -> None:
    rows = rows_4x4()
    grids = [{**row, "puzzle": as_lists(row["puzzle"])} for row in rows]
    for row in grids[::2]:
        del row["solution"]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(grids, indent=2) if as_list else "\n".join(map(json.dumps, grids)))
    task = Sudoku(data=file)
    for split in SPLITS:
        for index in range(10):
            assert task.example(split, index).info in rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1..4.4..2.4..3.", "line 1: `puzzle`: '1..4.4..2.4..3.' is no grid"),
        (f"\n{PUZZLE}\n1..4 .4..2.4..3.1", "line 3: `puzzle`: "),
        (lines("hardest.txt")[0], "line 1: `puzzle` is 9x9 while task.size is 4"),
        ("11..............", "line 1: the puzzle has a digit twice"),
        (SOLUTION, "line 1: the puzzle has no empty cell"),
        ('{"puzzle": "1"', "line 1 is not JSON"),
        ('{"grid": "1"}', "line 1 is not an object with `puzzle`"),
        ('[{"puzzle": "1"}]', "row 1: `puzzle`: '1' is no grid"),
        ("[1]", "row 1 is not an object"),
        (json.dumps({"puzzle": PUZZLE, "solution": "1"}), "line 1: `solution`: '1' is no grid"),
        (json.dumps({"puzzle": PUZZLE, "solution": PUZZLE}), "line 1: `solution` does not solve the puzzle"),
        (
            json.dumps({"puzzle": PUZZLE, "solution": "2143432112343412"}),
            "line 1: `solution` does not solve the puzzle",
        ),
        ("[" * 100_000, "is not JSON"),
        ("", "no row for the"),
        (PUZZLE, "no row for the"),
    ],
    ids=range(15),
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "rows"
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        Sudoku(data=file)
    assert str(caught.value).startswith(f"task.data: {file}")


@pytest.mark.parametrize(
    ("puzzle", "count"), [("1" + "." * 15, "several solutions"), ("123....4" + "." * 8, "no solution")]
)
def test_a_puzzle_that_has_not_one_solution_is_refused_when_it_is_asked_for(
    tmp_path: Path, puzzle: str, count: str
) -> None:
    file = tmp_path / "rows"
    good = [row["puzzle"] for row in rows_4x4()]
    file.write_text("\n".join([*good, puzzle]))
    message = f"task.data: {file}, line 21: the puzzle has {count}"
    with pytest.raises(ValueError, match=re.escape(message)):
        ask_for_all(file)


def ask_for_all(file: Path) -> None:
    task = Sudoku(data=file)
    for split in SPLITS:
        for index in range(30):
            task.example(split, index)


# The verdict.


@pytest.mark.parametrize(
    "completion",
    [
        SOLUTION,
        f" {SOLUTION} ",
        f"{SOLUTION}\nand on",
        f"{SOLUTION}\r\n",
        " ".join(SOLUTION),
        "12|34|34|12|21|43|43|21",
        "-+-|1234341221434321|-+-",
    ],
)
def test_plain_solutions(completion: str) -> None:
    score = judge(completion)
    assert score.value == pytest.approx(1)
    assert score.accuracy == 1


@pytest.mark.parametrize(
    ("completion", "accuracy"),
    [
        (to_rows(parse(SOLUTION)), 1),
        ("+---+---+\n|1 2|3 4|\n|3 4|1 2|\n+---+---+\n|2 1|4 3|\n|4 3|2 1|\n+---+---+\n", 1),
        ("12 34\n34 12\n\n21 43\n43 21", 1),
        ("The grid:\n1234\n3412\n2143\n4321", 0),
        ("1234\n3412\n2143\n4321\nDone.", 0),
        ("1234\n3412\n2143", 0),
        ("１２３４\n3412\n2143\n4321", 0),
        ("1234\n3412\n2143\n4321\n4321", 0),
        ("1234\n3412\n2143\n4351", 0),
    ],
)
def test_a_chats_whole_reply_is_the_grid(completion: str, accuracy: int) -> None:
    score = judge(completion, "chat")
    assert score.accuracy == accuracy
    assert score.value == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("completion", "accuracy", "form_grade"),
    [
        (f"so </think>\n<answer>{SOLUTION}</answer>", 1, 1.0),
        (f"<answer>1</answer> no, <answer>\n{to_rows(parse(SOLUTION))}\n</answer> and on", 1, 0.5),
        (f"<answer>{SOLUTION}</answer> no, <answer>{PUZZLE}</answer>", 0, 0.5),
        (f"</think> <answer>{SOLUTION}", 0, 0.1),
        (f"</think>\n<answer>the grid is {SOLUTION}</answer>", 0, 1.0),
        (SOLUTION, 0, 0.0),
    ],
)
def test_r1_reads_the_last_answer(completion: str, accuracy: int, form_grade: float) -> None:
    score = judge(completion, "r1")
    assert score.accuracy == accuracy
    assert score.components["format"] == pytest.approx(form_grade * WEIGHTS["format"])


@pytest.mark.parametrize(
    ("completion", "components"),
    [
        ("", (0, 0, 0, 0)),
        (f"\n{SOLUTION}", (0, 0, 0, 0)),
        (SOLUTION[:-1], (0, 0, 0, 0)),
        (SOLUTION + "1", (0, 0, 0, 0)),
        (PUZZLE, (1, 1, 0, 0)),
        (PUZZLE.replace(".", "0"), (1, 1, 0, 0)),
        ("." * 16, (1, 0, 0, 0)),
        ("1" * 16, (1, 2 / 7, 2 / 9, 0)),
        ("2" + SOLUTION[1:], (1, 6 / 7, 1, 0)),
        (SOLUTION[0] + "." + SOLUTION[2:], (1, 1, 8 / 9, 0)),
        ("2143432112343412", (1, 0, 0, 0)),
    ],
)
def test_partial_credit(completion: str, components: tuple[float, ...]) -> None:
    score = judge(completion)
    assert score.accuracy == 0
    assert list(score.components) == list(WEIGHTS)
    for name, share in zip(WEIGHTS, components, strict=True):
        assert score.components[name] == pytest.approx(WEIGHTS[name] * share), name


@given(st.sampled_from(SIZES), st.integers(0, 10**6), st.data())
@settings(max_examples=200, deadline=None)
def test_a_changed_solution_is_right_only_where_the_rules_say_so(size: Any, index: int, data: st.DataObject) -> None:
    drawn = random_puzzle(stream("changed", index), size, (4, 8))
    assert drawn is not None
    puzzle, solution = drawn
    grid = list(solution)
    for cell in data.draw(st.lists(st.integers(0, size**2 - 1), max_size=3)):
        grid[cell] = data.draw(st.integers(0, size))
    if data.draw(st.booleans()):  # two digits change places everywhere: the rules still hold, the givens need not
        one, other = data.draw(st.integers(1, size)), data.draw(st.integers(1, size))
        grid = [{one: other, other: one}.get(digit, digit) for digit in grid]
    info = {"puzzle": to_line(puzzle), "solution": to_line(solution)}
    score = judge(to_line(tuple(grid)), info=info)
    right = all(digit == given for digit, given in zip(grid, puzzle, strict=True) if given)
    assert score.accuracy == (right and obeys_the_rules(tuple(grid)))
    assert score.accuracy == (tuple(grid) == solution)
    assert score.value == pytest.approx(1) if score.accuracy else score.value < 0.5


def test_solved_is_found_without_the_stored_solution() -> None:
    score = judge(SOLUTION, info={"puzzle": PUZZLE, "solution": "2143432112343412"})
    assert score.accuracy == 1
    assert score.components["cells"] == 0


@given(
    st.text() | st.text(alphabet="01234.|-+ \n\r\t", min_size=12) | st.text(alphabet="1234", min_size=16, max_size=16),
    st.sampled_from(get_args(Template)),
)
def test_any_completion_gets_a_score_that_is_the_sum_of_its_components(completion: str, form: Template) -> None:
    score = judge(completion, form)
    assert score.value == sum(score.components.values())
    assert 0 <= score.value <= 1.0001
    assert score.accuracy in (0, 1)


@pytest.mark.parametrize("form", get_args(Template))
def test_a_huge_completion_is_scored_at_once(form: Template) -> None:
    start = time.perf_counter()
    for piece in ("<answer>", "</think>\n<answer>", "<answer></answer>", "1", "|-", " ", "１", "\0", "\n1"):
        assert judge(piece * 200_000, form).accuracy == 0
    assert judge("-" * 500_000 + SOLUTION + "+" * 500_000, "chat").accuracy == 1
    assert time.perf_counter() - start < 2


def test_weights() -> None:
    score = judge(SOLUTION, weights={"format": 0.0, "solved": 2.0})
    assert score.components == {"format": 0.0, "givens": 0.1, "cells": 0.3, "solved": 2.0}
    with pytest.raises(ValueError, match=r"task\.weights: 'format' is -1"):
        sudoku_verifier("plain", {"format": -1})
    with pytest.raises(ValueError, match="form is 'poem'"):
        sudoku_verifier("poem")  # type: ignore[arg-type]


# The config.

CONFIG: dict[str, Any] = {
    "name": "small",
    "model": {"source": "org/model"},
    "optimizer": {"lr": 1},
    "task": {"kind": "sudoku"},
    "budget": {"generations": 3},
}


def test_the_config_has_the_fields_and_defaults_of_the_task() -> None:
    task = parse_config(CONFIG).task
    assert isinstance(task, SudokuTaskConfig)
    parameters = inspect.signature(Sudoku).parameters
    assert set(SudokuTaskConfig.model_fields) - {"kind", "reward", "deadline", "memory_gb"} == set(parameters)
    for name, parameter in parameters.items():
        assert getattr(task, name) == parameter.default, name


def test_the_config_builds_the_task() -> None:
    settings = {"kind": "sudoku", "size": 9, "blanks": [10, 20], "template": "plain", "weights": {"solved": 2}}
    task = parse_config({**CONFIG, "task": settings}).task.build()
    assert isinstance(task, Sudoku)
    assert task.verifier == VerifierSpec("sudoku", {"form": "plain", "weights": {**WEIGHTS, "solved": 2.0}})
    assert len(task.example("train", 0).id) == 81
