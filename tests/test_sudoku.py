"""Sudoku: its grids, solver, puzzles, prompts, files and verdicts."""

from __future__ import annotations

import inspect
import json
import random
import re
import time
from itertools import permutations, product
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from es_engine.config import SudokuTaskConfig, parse_config
from rewards.base import Rollout, Score, Split, VerifierSpec, as_score
from rewards.problems import split_of_key, stream
from rewards.sudoku import WEIGHTS, Sudoku, Template, read_answer, sudoku_verifier
from rewards.sudoku_grids import (
    MAX_BLANKS,
    SIZES,
    Grid,
    count_solutions,
    is_complete,
    is_possible,
    keeps,
    parse,
    random_puzzle,
    size_of,
    solve,
    to_line,
    to_rows,
)
from rewards.sudoku_problems import problem_key
from rewards.sudoku_prompts import PLAIN_ALPHABET

SPLITS: tuple[Split, ...] = get_args(Split)
DATA = Path(__file__).parent / "data" / "sudoku"
FILES = ("twenty_of_10k.txt", "hardest.txt")

PUZZLE, SOLUTION = "1..4.4..2.4..3.1", "1234341221434321"
INFO = {"puzzle": PUZZLE, "solution": SOLUTION}
# Norvig's puzzle without a solution, on which a search that tries cells alone is busy for minutes.
UNSOLVABLE = ".....5.8....6.1.43..........1.5........1.6...3.......553.....61........4........."


def judge(completion: str, form: Template = "plain", info: dict[str, Any] = INFO, **options: Any) -> Score:
    verifier = VerifierSpec("sudoku", {"form": form, **options}).load()
    return as_score(verifier(Rollout("", completion, info["solution"], info)))


def obeys_the_rules(grid: Grid) -> bool:
    """The rules once more, straight from their wording."""
    size = size_of(grid)
    box = {4: 2, 9: 3}[size]
    for one, other in permutations(range(size * size), 2):
        (row, column), (row_2, column_2) = divmod(one, size), divmod(other, size)
        same_box = (row // box, column // box) == (row_2 // box, column_2 // box)
        if (row == row_2 or column == column_2 or same_box) and grid[one] == grid[other]:
            return False
    return all(1 <= digit <= size for digit in grid)


def every_4x4_grid() -> list[Grid]:
    """All full grids of 4x4, by trying every four rows."""
    rows = list(permutations((1, 2, 3, 4)))
    stacks = ((*a, *b, *c, *d) for a, b in product(rows, rows) if clash_free(a, b) for c in rows for d in rows)
    return [grid for grid in stacks if obeys_the_rules(grid)]


def clash_free(first: tuple[int, ...], second: tuple[int, ...]) -> bool:
    return len({*first[:2], *second[:2]}) == 4 == len({*first[2:], *second[2:]})


@pytest.fixture(scope="module")
def full_grids() -> list[Grid]:
    return every_4x4_grid()


def lines(name: str) -> list[str]:
    return (DATA / name).read_text().split()


# Grids.


@given(st.sampled_from(SIZES), st.data())
def test_what_is_printed_is_read_back(size: int, data: st.DataObject) -> None:
    grid = tuple(data.draw(st.lists(st.integers(0, size), min_size=size**2, max_size=size**2)))
    line = to_line(grid)
    assert parse(line) == parse(line.replace(".", "0")) == grid
    assert parse([list(grid[row * size : (row + 1) * size]) for row in range(size)]) == grid
    assert read_answer(to_rows(grid), size) == grid
    assert len(to_rows(grid).split("\n")) == size


EMPTY_ROWS = [[0] * 4] * 3
NO_GRIDS = [
    *("", "1", "." * 15, "." * 17, "." * 80, "5" + "." * 15, "x" * 16, "１" * 16, "²" * 16, " " * 16, "-" * 81),
    *(None, 1234, {}, [], EMPTY_ROWS, [[0] * 3] * 4, [*EMPTY_ROWS, "0000"], [*EMPTY_ROWS, [0, 0, 0, 5]]),
    *([*EMPTY_ROWS, [0, 0, 0, last]] for last in (True, -1, 1.0, "1", None, [])),
]


@pytest.mark.parametrize("written", NO_GRIDS, ids=range(len(NO_GRIDS)))
def test_what_is_no_grid_is_refused(written: Any) -> None:
    with pytest.raises(ValueError, match="is no grid; accepted are 16 characters"):
        parse(written)


def test_the_rules(full_grids: list[Grid]) -> None:
    assert len(full_grids) == 288
    assert all(is_complete(grid) and is_possible(grid) for grid in full_grids)
    numbers = random.Random(1)
    for _ in range(3000):
        grid = list(numbers.choice(full_grids))
        for _ in range(numbers.randint(1, 2)):
            grid[numbers.randrange(16)] = numbers.randint(1, 4)
        assert is_complete(tuple(grid)) == is_possible(tuple(grid)) == obeys_the_rules(tuple(grid))


# The solver.


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_the_solver_finds_and_counts_what_trying_every_grid_does(full_grids: list[Grid], data: st.DataObject) -> None:
    base = data.draw(st.sampled_from(full_grids))
    puzzle = [digit if data.draw(st.booleans()) else 0 for digit in base]
    if data.draw(st.booleans()):
        puzzle[data.draw(st.integers(0, 15))] = data.draw(st.integers(1, 4))
    there = [grid for grid in full_grids if keeps(grid, tuple(puzzle))]
    assert count_solutions(tuple(puzzle), at_most=300) == len(there)
    found = solve(tuple(puzzle))
    assert found in there if there else found is None


@pytest.mark.parametrize("name", FILES)
def test_the_solver_finds_the_one_solution_of_published_puzzles(name: str) -> None:
    for line in lines(name):
        puzzle = parse(line)
        assert count_solutions(puzzle) == 1
        found = solve(puzzle)
        assert found is not None
        assert obeys_the_rules(found)
        assert keeps(found, puzzle)


def test_solutions_are_counted_up_to_a_number() -> None:
    assert count_solutions((0,) * 16, at_most=1000) == 288
    assert count_solutions((0,) * 81) == 2
    assert count_solutions((0,) * 81, at_most=50) == 50
    # Two digits that are taken out everywhere can change places.
    solution = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
    assert count_solutions(parse(solution)) == 1
    assert count_solutions(parse(solution.replace("6", ".").replace("7", ".")), at_most=100) > 1


@pytest.mark.parametrize("line", [UNSOLVABLE, "11" + "." * 79, "12345678." + "." * 17 + "9" + "." * 54])
def test_a_puzzle_without_solution_is_soon_known_to_have_none(line: str) -> None:
    start = time.perf_counter()
    assert solve(parse(line)) is None
    assert count_solutions(parse(line)) == 0
    assert time.perf_counter() - start < 1


TRAIN_IDS = ["1.233.14234...32", ".43.2.1.32.1..2.", "..34432..24...1."]
HELDOUT_IDS = ["214334.2....42..", "13..4...243.3142"]
ID_9X9 = "..2.56...3..4..852.7.3..164..82.1.9.12......67..948.31283...517....1..236.....94."

# The generator.


@pytest.mark.parametrize(
    ("size", "blanks", "count"),
    [(4, (4, 8), 300), (4, (1, 1), 50), (4, (12, 12), 50), (9, (30, 45), 40), (9, (58, 58), 3), (9, (1, 58), 40)],
)
def test_generated_puzzles_keep_to_the_settings_and_have_one_solution(
    full_grids: list[Grid], size: Any, blanks: tuple[int, int], count: int
) -> None:
    task = Sudoku(size=size, blanks=blanks)
    for index in range(count):
        row = task.example("train", index).info
        puzzle, solution = parse(row["puzzle"]), parse(row["solution"])
        assert size_of(puzzle) == size
        assert blanks[0] <= puzzle.count(0) <= blanks[1]
        assert obeys_the_rules(solution)
        assert keeps(solution, puzzle)
        assert count_solutions(puzzle) == 1
        if size == 4:
            assert [grid for grid in full_grids if keeps(grid, puzzle)] == [solution]


def test_the_number_of_blanks_is_spread_over_the_range() -> None:
    blanks = [Sudoku(blanks=(1, 8)).example("train", index).info["puzzle"].count(".") for index in range(200)]
    assert set(blanks) == set(range(1, 9))


def test_all_full_grids_of_4x4_are_drawn(full_grids: list[Grid]) -> None:
    drawn = (random_puzzle(stream("grids", index), 4, (1, 1)) for index in range(4000))
    # Were all equally likely, one of 288 would be missing from 4,000 draws once in 3,700 times.
    assert {pair[1] for pair in drawn if pair is not None} == set(full_grids)


def test_a_problem_depends_on_seed_split_and_index_alone() -> None:
    forwards, backwards = Sudoku(seed=5), Sudoku(seed=5)
    for split in SPLITS:
        ahead = [forwards.example(split, index) for index in range(60)]
        assert ahead == [backwards.example(split, index) for index in reversed(range(60))][::-1]
        assert ahead != [Sudoku(seed=6).example(split, index) for index in range(60)]


def test_the_stream_of_a_seed_never_changes() -> None:
    """Ledgers name problems by split and index: these must mean the same in every version."""
    assert [Sudoku(seed=1).example("train", index).id for index in (0, 1, 10**12)] == TRAIN_IDS
    assert [Sudoku(seed=1).example("heldout", index).id for index in (0, 1)] == HELDOUT_IDS
    assert Sudoku(seed=1, size=9, blanks=(40, 50)).example("train", 0).id == ID_9X9


@pytest.mark.parametrize("blanks", [(1, 2), (4, 8), (11, 12)])
def test_splits_are_disjoint(blanks: tuple[int, int]) -> None:
    seeds = [Sudoku(seed=seed, blanks=blanks) for seed in (1, 2)]
    train = {problem_key(task.example("train", index).info) for task in seeds for index in range(600)}
    heldout = {problem_key(task.example("heldout", index).info) for task in seeds for index in range(150)}
    assert not train & heldout
    assert {split_of_key(key) for key in train} == {"train"}
    assert {split_of_key(key) for key in heldout} == {"heldout"}
    assert len({problem_key(seeds[0].example("heldout", index).info) for index in range(150)}) == 150


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


def test_a_curriculum_goes_from_few_blanks_to_the_tasks_own() -> None:
    stages = [{"problems": 2, "blanks": (1, 2)}, {"problems": 3, "blanks": (3, 3)}]
    task, plain = Sudoku(blanks=(6, 6), curriculum=stages), Sudoku(blanks=(6, 6))
    blanks = [task.example("train", index).info["puzzle"].count(".") for index in range(7)]
    assert max(blanks[:2]) <= 2
    assert blanks[2:] == [3, 3, 3, 6, 6]
    assert task.example("train", 5) == plain.example("train", 5)
    assert task.example("heldout", 0) == plain.example("heldout", 0)
    with pytest.raises(ValueError, match=r"^task\.curriculum\.1\.blanks: \(1, 13\) is no range within 1 to 12"):
        Sudoku(curriculum=[stages[0], {"problems": 3, "blanks": (1, 13)}])


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
    grids = [
        {**row, "puzzle": [list(parse(row["puzzle"])[start : start + 4]) for start in (0, 4, 8, 12)]} for row in rows
    ]
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
