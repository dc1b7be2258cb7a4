"""Sudoku's puzzles: their grids, the solver, and the stream that the generator makes of a seed."""

from __future__ import annotations

import random
import time
from itertools import permutations, product
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from published_sudoku import FILES, lines, obeys_the_rules

from rewards.base import Split
from rewards.problems import split_of_key, stream
from rewards.sudoku import Sudoku, read_answer
from rewards.sudoku_grids import (
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

SPLITS: tuple[Split, ...] = get_args(Split)
# Norvig's puzzle without a solution, on which a search that tries cells alone is busy for minutes.
UNSOLVABLE = ".....5.8....6.1.43..........1.5........1.6...3.......553.....61........4........."


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
