"""Where Sudoku problems come from: a seeded generator, and files.

A problem is a row `{"puzzle": "1.3..4.2...", "solution": "123..."}` of lines as `to_line` writes them. The problem is
its givens: a hash of the puzzle's line assigns it to the training or the held-out split, the same for every seed and
source, so the two can never share a puzzle. Puzzles that differ in a single given, or in the names of the digits, are
two problems, even where they have the same solution: with the 288 grids of 4x4, most solutions are met in both splits.
"""

from __future__ import annotations

import random
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from rewards.base import Split
from rewards.problems import DrawnProblems, FiledProblems, Row, lines_of, read_records, read_text
from rewards.sudoku_grids import (
    MAX_BLANKS,
    Grid,
    is_complete,
    is_possible,
    keeps,
    parse,
    random_puzzle,
    size_of,
    solutions,
    to_line,
)

_KEPT = 4096  # solved puzzles of a file


def problem_key(row: Row) -> str:
    """The givens of a row's puzzle, as its line."""
    return str(row["puzzle"])


def generated(size: int, blanks: tuple[int, int], seed: int, field: str = "task") -> DrawnProblems:
    """Random puzzles with one solution and a number of empty cells in the range `blanks` (see `random_puzzle`). Raises
    ValueError, naming `blanks` as part of `field`, for a range that cannot be."""
    if not 1 <= blanks[0] <= blanks[1] <= MAX_BLANKS[size]:
        raise ValueError(f"{field}.blanks: {blanks} is no range within 1 to {MAX_BLANKS[size]}, for a size of {size}")

    def draw(numbers: random.Random) -> Row | None:
        drawn = random_puzzle(numbers, size, blanks)
        return None if drawn is None else {"puzzle": to_line(drawn[0]), "solution": to_line(drawn[1])}

    return DrawnProblems(draw, problem_key, seed, f"size={size}, blanks={blanks}", field=field)


class FiledPuzzles:
    """Puzzles from files (see `read_rows` and `FiledProblems`), all of one size.

    They are solved when they are first asked for: it takes half a millisecond each, and every process of a run reads
    the whole file. `row` raises ValueError, naming file and line, for a puzzle with no solution or with several.
    """

    def __init__(self, data: Path, heldout_data: Path | None, size: int, seed: int) -> None:
        rows = read_rows(data, "task.data", size)
        heldout = None if heldout_data is None else read_rows(heldout_data, "task.heldout_data", size)
        self._places = {row["puzzle"]: place for place, row in [*(heldout or []), *rows]}
        held = None if heldout is None else [row for _, row in heldout]
        self._problems = FiledProblems([row for _, row in rows], held, problem_key, seed, str(data))
        self._solution = lru_cache(_KEPT)(self._solve)

    def row(self, split: Split, index: int) -> Row:
        row = self._problems.row(split, index)
        return {**row, "solution": self._solution(row["puzzle"])}

    def _solve(self, puzzle: str) -> str:
        found = list(islice(solutions(parse(puzzle)), 2))
        if len(found) != 1:
            count = "several solutions" if found else "no solution"
            raise ValueError(f"{self._places[puzzle]}: the puzzle has {count}; accepted are puzzles with exactly one")
        return to_line(found[0])


def read_rows(path: Path, field: str, size: int) -> list[tuple[str, Row]]:
    """The rows of a file, each with its place for error messages and its puzzle as a line.

    The file holds one puzzle a line, or else JSON lines or one JSON list of objects with the puzzle under `puzzle` and
    perhaps its solution under `solution`; `parse` says how both may be written. Raises ValueError naming `field`, file
    and line or row for a puzzle of another size, one that breaks the rules or has no empty cell, and a solution that is
    none.
    """
    text = read_text(path, field)
    if text.lstrip().startswith(("{", "[")):
        return [(place, _checked(record, place, size)) for place, record in read_records(path, field)]
    return [(place, _checked({"puzzle": line.strip()}, place, size)) for place, line in lines_of(text, path, field)]


def _checked(record: Any, place: str, size: int) -> Row:
    if not isinstance(record, dict) or "puzzle" not in record:
        raise ValueError(f"{place} is not an object with `puzzle`")
    puzzle = _grid(record["puzzle"], f"{place}: `puzzle`", size)
    if not is_possible(puzzle) or 0 not in puzzle:
        fault = "has no empty cell" if is_possible(puzzle) else "has a digit twice in a row, column or box"
        raise ValueError(f"{place}: the puzzle {fault}; accepted are puzzles with exactly one solution to be found")
    row = {**record, "puzzle": to_line(puzzle)}
    if record.get("solution") is not None:
        solution = _grid(record["solution"], f"{place}: `solution`", size)
        if not (is_complete(solution) and keeps(solution, puzzle)):
            raise ValueError(f"{place}: `solution` does not solve the puzzle; correct it or leave it out")
    return row


def _grid(written: Any, what: str, size: int) -> Grid:
    try:
        grid = parse(written)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    if size_of(grid) != size:
        raise ValueError(f"{what} is {size_of(grid)}x{size_of(grid)} while task.size is {size}")
    return grid
