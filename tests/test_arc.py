"""ARC: its files, prompts, grids and verdicts."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from es_engine.config import ArcTaskConfig, parse_config
from rewards.arc import WEIGHTS, Arc, Grid, Template, cells, parse_grids, print_grids, read_folder
from rewards.base import Rollout, Score, Split, VerifierSpec, as_score
from rewards.problems import split_of_key
from workers.scoring import Scorer

TRAINING = Path(__file__).parent / "data" / "arc-agi-1" / "training"
SPLITS: tuple[Split, ...] = get_args(Split)
PAIR = {"input": [[1, 2]], "output": [[2, 1]]}
INFO = {"test": [{"input": [[0, 0]], "output": [[1, 2, 3], [4, 5, 6]]}, {"input": [[0]], "output": [[7]]}]}

grids = st.integers(1, 8).flatmap(
    lambda width: st.lists(st.lists(st.integers(0, 9), min_size=width, max_size=width), min_size=1, max_size=8)
)


def judge(completion: str, info: dict[str, Any] = INFO, **options: Any) -> Score:
    verifier = VerifierSpec("arc", options).load()
    return as_score(verifier(Rollout("", completion, "", info)))


def grades(text: str) -> list[float]:
    """format, shape, cells and solved of an answer, unweighted."""
    components = judge(f"<answer>{text}</answer>", weights=dict.fromkeys(WEIGHTS, 1.0)).components
    assert list(components) == ["format", "shape", "cells", "solved"]
    return list(components.values())


def write_problems(folder: Path, **problems: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for name, problem in problems.items():
        (folder / f"{name}.json").write_text(json.dumps(problem))
    return folder


# Files.


def test_problems_are_split_by_their_ids() -> None:
    task = Arc(data=TRAINING)
    ids = {split: {task.example(split, index).id for index in range(16)} for split in SPLITS}
    names = {file.stem for file in TRAINING.glob("*.json")}
    assert ids["train"] | ids["heldout"] == names
    assert ids["heldout"] == {name for name in names if split_of_key(name) == "heldout"}
    assert not ids["train"] & ids["heldout"]


def test_a_problem_of_the_heldout_folder_is_left_out_of_training(tmp_path: Path) -> None:
    problem = {"train": [PAIR], "test": [PAIR]}
    data = write_problems(tmp_path / "data", a=problem, b=problem, c=problem)
    task = Arc(data=data, heldout_data=write_problems(tmp_path / "heldout", b=problem))
    assert {task.example("train", index).id for index in range(4)} == {"a", "c"}
    assert task.example("heldout", 3).id == "b"


def test_large_problems_are_left_out() -> None:
    sizes = {row["id"]: cells(row) for row in read_folder(TRAINING, "task.data")}
    limit = sorted(sizes.values())[4]
    kept = {row["id"] for row in read_folder(TRAINING, "task.data", limit)}
    assert kept == {name for name, size in sizes.items() if size <= limit}
    assert 5 <= len(kept) < len(sizes)
    with pytest.raises(
        ValueError, match=f"^task.max_cells: 3 leaves out all of .*; the least is {min(sizes.values())}"
    ):
        Arc(data=TRAINING, max_cells=3)


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ([], "is not an object"),
        ({"train": [PAIR]}, "`test` is None"),
        ({"train": [], "test": [PAIR]}, "`train` is []"),
        ({"train": [PAIR], "test": [{"input": [[1]]}]}, "`test` is"),
        ({"train": [PAIR], "test": [{"input": [[1]], "output": [[1], [1, 2]]}]}, "`test` is"),
        ({"train": [PAIR], "test": [{"input": [[1]], "output": [[10]]}]}, "`test` is"),
        ({"train": [PAIR], "test": [{"input": [[1]], "output": [[True]]}]}, "`test` is"),
        ({"train": [PAIR], "test": [{"input": [[]], "output": [[1]]}]}, "`test` is"),
        ({"train": [PAIR], "test": [{"input": [[1] * 31], "output": [[1]]}]}, "`test` is"),
    ],
)
def test_a_bad_file_is_named(problem: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        Arc(data=write_problems(tmp_path, bad=problem))
    assert str(caught.value).startswith(f"task.data: {tmp_path / 'bad.json'}")


def test_bad_settings_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^task\.data: no folder "):
        Arc(data=tmp_path / "absent")
    with pytest.raises(ValueError, match=r"^task\.data: .* has no \.json file"):
        Arc(data=tmp_path)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match=r"^task\.data: .*bad\.json is not JSON"):
        Arc(data=tmp_path)
    with pytest.raises(ValueError, match=r"^task\.template: 'r1' is not one of chat, plain"):
        Arc(data=TRAINING, template="r1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^task\.weights: 'solve' is 1"):
        Arc(data=TRAINING, weights={"solve": 1})


def test_the_config_builds_the_task() -> None:
    base = {"name": "x", "model": {"source": "org/model"}, "optimizer": {"lr": 1.0}, "budget": {"generations": 1}}
    config = parse_config({**base, "task": {"kind": "arc", "data": str(TRAINING), "weights": {"cells": 0.0}}})
    assert isinstance(config.task, ArcTaskConfig)
    assert config.task.build().verifier.options["weights"] == {**WEIGHTS, "cells": 0.0}


# Prompts and worked solutions.


@pytest.mark.parametrize("template", get_args(Template))
def test_prompts_show_the_grids_and_worked_solutions_solve_them(template: Template) -> None:
    task = Arc(data=TRAINING, template=template)
    verifier = task.verifier.load()
    several = 0
    for split in SPLITS:
        for index in range(8):
            example = task.example(split, index)
            text = example.prompt if example.messages is None else example.messages[0]["content"]
            assert text is not None
            shown = [grid for pair in example.info["train"] for grid in (pair["input"], pair["output"])]
            tests = example.info["test"]
            assert parse_grids(text) == shown + [pair["input"] for pair in tests]
            several += len(tests) > 1
            score = as_score(verifier(Rollout(text, task.worked_solution(example), example.answer, example.info)))
            assert (score.value, score.accuracy) == (pytest.approx(1), 1)
    assert several


# Grids.


@given(st.lists(grids, max_size=4))
def test_printed_grids_are_read_back(many: list[Grid]) -> None:
    text = print_grids(many)
    assert parse_grids(text) == many
    assert parse_grids(re.sub("([0-9])", r"\1 ", text)) == many
    assert parse_grids(text.replace("\n", "\r\n")) == many


def test_any_other_line_ends_a_grid() -> None:
    assert parse_grids("Test 1:\n12\n3 4\n```\n5\n\n\n6\n1,2\n٣\n-7\n8") == [[[1, 2], [3, 4]], [[5]], [[6]], [[8]]]


# Verdicts.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("123\n456\n\n7", [1, 1, 1, 1]),
        ("1 2 3\n4 5 6\n\n 7 ", [1, 1, 1, 1]),
        ("123\n456\n\n8", [1, 1, 6 / 7, 0]),
        ("12\n45\n\n7", [1, 0.5, 5 / 7, 0]),
        ("123\n456\n789\n\n7", [1, 0.5, 7 / 10, 0]),
        ("7\n\n123\n456", [1, 0, 0, 0]),
        ("123\n456", [0, 0, 0, 0]),
        ("123\n456\n\n7\n\n7", [0, 0, 0, 0]),
        ("123\n45\n\n7", [0, 0, 0, 0]),
        ("123\n456\n\n" + "7" * 31, [0, 0, 0, 0]),
        ("", [0, 0, 0, 0]),
    ],
)
def test_partial_credit(text: str, expected: list[float]) -> None:
    assert grades(text) == pytest.approx(expected)


def test_the_last_answer_counts_and_there_must_be_one() -> None:
    assert judge("<answer>0</answer> no: <answer>\n123\n456\n\n7\n</answer>").accuracy == 1
    assert judge("123\n456\n\n7").value == 0


@given(grids, st.data())
def test_an_answer_with_another_cell_is_never_solved(grid: Grid, data: st.DataObject) -> None:
    row, column = (data.draw(st.integers(0, len(side) - 1)) for side in (grid, grid[0]))
    changed = [list(line) for line in grid]
    changed[row][column] = (changed[row][column] + data.draw(st.integers(1, 9))) % 10
    info = {"test": [{"input": grid, "output": grid}]}
    score = judge(f"<answer>{print_grids([changed])}</answer>", info)
    size = len(grid) * len(grid[0])
    assert score.accuracy == 0
    assert score.components["cells"] == pytest.approx(WEIGHTS["cells"] * (size - 1) / size)
    assert judge(f"<answer>{print_grids([grid])}</answer>", info).accuracy == 1


@given(st.text() | st.text(alphabet="0123456789 \n"))
def test_any_completion_gets_a_score_that_is_the_sum_of_its_components(text: str) -> None:
    score = judge(f"<answer>{text}</answer>")
    assert score.value == sum(score.components.values())
    assert 0 <= score.value <= 1.0001
    assert score.accuracy in (0, 1)


def test_hostile_answers_are_scored_at_once_and_the_next_rollout_still_scores() -> None:
    pieces = ("<answer>", "0" * 1000, "0\n", "0\n\n", " ", "\n", "9 ", "\x00", "\ud800", "((")
    start = time.perf_counter()
    with Scorer(VerifierSpec("arc")) as scorer:
        for number, piece in enumerate(pieces):
            text = f"<answer>{piece * (1_000_000 // len(piece))}</answer>"
            scorer.submit(number, Rollout("", text, "", INFO))
            scorer.submit((number, "next"), Rollout("", "<answer>123\n456\n\n7</answer>", "", INFO))
        scores = scorer.drain()
        assert not scorer.failures
    assert time.perf_counter() - start < 20
    assert {key: score.accuracy for key, score in scores.items()} == {
        key: float(key not in range(10)) for key in scores
    }
