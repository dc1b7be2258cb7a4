"""Sudoku grids of 4x4 and 9x9 cells: plain data, text forms, the rules, an exact solver and a generator of puzzles.

A grid is a tuple of its cells row by row, 0 where a cell is empty: 16 cells are a 4x4 grid with boxes of 2x2, 81 a 9x9
grid with boxes of 3x3. Sets of cells are bit masks, where bit number `row * size + column` is the cell.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from math import isqrt
from typing import Any

from rewards.problems import below

Grid = tuple[int, ...]

SIZES = (4, 9)
MAX_BLANKS = {4: 12, 9: 58}
"""The most empty cells of a generated puzzle. A 4x4 puzzle needs four givens. A 9x9 puzzle can do with 17, but when its
cells are taken out in random order until none can be spared, one puzzle in five comes down to 23."""


def size_of(grid: Sequence[int]) -> int:
    """How many rows the grid has, which is also how many columns, boxes and digits."""
    return isqrt(len(grid))


def parse(written: Any) -> Grid:
    """The grid that is written as a line of 16 or 81 characters, `.` or `0` where a cell is empty, or as a list of rows
    of whole numbers, 0 where a cell is empty. Raises ValueError, saying what is accepted, for anything else."""
    cells = _from_line(written) if isinstance(written, str) else _from_rows(written)
    if cells is None or not all(cell <= size_of(cells) for cell in cells):
        raise ValueError(
            f"{written!r:.100} is no grid; accepted are 16 characters of 1 to 4 or 81 of 1 to 9, with . or 0 for an "
            "empty cell, and a list of 4 or 9 lists of numbers, with 0 for an empty cell"
        )
    return cells


def to_line(grid: Grid) -> str:
    """The cells in one line, `.` where a cell is empty; `parse` reads it back."""
    return "".join(map(str, grid)).replace("0", ".")


def to_rows(grid: Grid) -> str:
    """A line for each row, a space between its cells, `.` where a cell is empty."""
    size, line = size_of(grid), to_line(grid)
    return "\n".join(" ".join(line[start : start + size]) for start in range(0, len(line), size))


def is_complete(grid: Grid) -> bool:
    """Whether every row, column and box holds every digit once."""
    digits = set(range(1, size_of(grid) + 1))
    return all({grid[cell] for cell in unit} == digits for unit in _board(size_of(grid)).units)


def is_possible(grid: Grid) -> bool:
    """Whether no row, column or box holds a digit twice; a grid may be so and yet have no solution."""
    units = ([grid[cell] for cell in unit if grid[cell]] for unit in _board(size_of(grid)).units)
    return all(len(set(digits)) == len(digits) for digits in units)


def keeps(grid: Grid, puzzle: Grid) -> bool:
    """Whether the grid has every given of a puzzle of its size where it was."""
    return all(given in (0, cell) for cell, given in zip(grid, puzzle, strict=True))


def solve(grid: Grid) -> Grid | None:
    """A solution of the puzzle, or None where there is none."""
    return next(solutions(grid), None)


def count_solutions(grid: Grid, at_most: int = 2) -> int:
    """How many solutions the puzzle has, counted up to `at_most`."""
    return sum(1 for _ in islice(solutions(grid), at_most))


def solutions(grid: Grid) -> Iterator[Grid]:
    """Every solution of the puzzle, one after the other."""
    board = _board(size_of(grid))
    return (_grid(places) for places in _search(*_state(grid), board))


def random_puzzle(numbers: random.Random, size: int, blanks: tuple[int, int]) -> tuple[Grid, Grid] | None:
    """A puzzle with one solution, and that solution: a random full grid with cells taken out in random order.

    How many is drawn from the range `blanks`. A cell stays where, without it, there would be a second solution; where
    too few cells are left for the number drawn, the puzzle will do if it is still in the range, and is None if not.
    """
    low, high = blanks
    wanted = low + below(numbers, high - low + 1)
    solution = _random_solution(numbers, size)
    puzzle, taken = list(solution), 0
    for cell in _shuffled(numbers, range(size * size)):
        if taken < wanted and _is_implied(puzzle, cell):
            puzzle[cell] = 0
            taken += 1
    return (tuple(puzzle), solution) if taken >= low else None


@dataclass(frozen=True, slots=True)
class _Board:
    """What all grids of a size share. A unit is a row, column or box; a cell's peers are the others of its units."""

    cells: int
    units: tuple[tuple[int, ...], ...]
    unit_masks: tuple[int, ...]
    peers: tuple[int, ...]


@lru_cache
def _board(size: int) -> _Board:
    box = isqrt(size)
    cells = range(size * size)
    rows = [[cell for cell in cells if cell // size == row] for row in range(size)]
    columns = [[cell for cell in cells if cell % size == column] for column in range(size)]
    boxes = [
        [cell for cell in cells if (cell // size // box, cell % size // box) == corner]
        for corner in ((row, column) for row in range(box) for column in range(box))
    ]
    units = tuple(map(tuple, rows + columns + boxes))
    peers = [_mask({each for unit in units if cell in unit for each in unit} - {cell}) for cell in cells]
    return _Board(_mask(cells), units, tuple(map(_mask, units)), tuple(peers))


# A search knows, for each digit, the cells where it stands or may yet stand, and which cells are empty.
_Places = list[int]


def _state(grid: Sequence[int]) -> tuple[_Places, int]:
    board = _board(size_of(grid))
    places = [board.cells] * size_of(grid)
    given = [0] * size_of(grid)
    for cell, digit in enumerate(grid):
        if digit:
            given[digit - 1] |= 1 << cell
            places[digit - 1] &= ~board.peers[cell]
    empty = board.cells & ~sum(given)
    return [place & (empty | own) for place, own in zip(places, given, strict=True)], empty


def _search(places: _Places, empty: int, board: _Board, numbers: random.Random | None = None) -> Iterator[_Places]:
    """Every way to fill the empty cells. What can be filled in one way only is; then the most constrained choice is
    tried each way, in random order where `numbers` are given. The places passed in are used up."""
    while True:
        once = twice = thrice = 0  # the cells where at least one, two, three digits may stand
        for place in places:
            thrice |= twice & place
            twice |= once & place
            once |= place
        if once != board.cells:
            return
        if not empty:
            yield places
            return
        if single := empty & ~twice:
            _fill_singles(places, single, board)
            empty ^= single
            continue
        left = _fill_only_places(places, empty, board)
        if left is None:
            return
        if left == empty:
            break
        empty = left
    choices = _choices(places, empty, twice & ~thrice & empty, board)
    for digit, cell in choices if numbers is None else _shuffled(numbers, choices):
        after = [place & ~(1 << cell) for place in places]
        after[digit] = places[digit] & ~board.peers[cell]
        yield from _search(after, empty ^ 1 << cell, board, numbers)


def _fill_singles(places: _Places, single: int, board: _Board) -> None:
    """Fill the cells where a single digit may stand. Two peers with the same one take it from each other, and are then
    cells where none may stand."""
    for digit in range(len(places)):
        for cell in _cells(places[digit] & single):
            places[digit] &= ~board.peers[cell]


def _fill_only_places(places: _Places, empty: int, board: _Board) -> int | None:
    """Fill the cells that are the only place of a digit in a unit. What is then empty, or None where a digit has no
    place in a unit."""
    for digit in range(len(places)):
        place = places[digit]
        if not place & empty:
            continue
        for unit in board.unit_masks:
            found = place & unit
            if found & (found - 1):  # more than one
                continue
            if not found:
                return None
            if found & empty:
                empty ^= found
                for other in range(len(places)):
                    places[other] &= ~found
                place = places[digit] = place & ~board.peers[_first(found)]
    return empty


def _choices(places: _Places, empty: int, pairs: int, board: _Board) -> list[tuple[int, int]]:
    """Digits and cells of which one is right: the digits of a cell that has two (`pairs` are these cells), else the
    places of a digit that has two in a unit, else the digits of a cell that has the fewest."""
    if pairs:
        return _digits_of(_first(pairs), places)
    for digit, place in enumerate(places):
        if place & empty:
            for unit in board.unit_masks:
                if (place & unit).bit_count() == 2:
                    return [(digit, cell) for cell in _cells(place & unit)]
    return min((_digits_of(cell, places) for cell in _cells(empty)), key=len)


def _digits_of(cell: int, places: _Places) -> list[tuple[int, int]]:
    return [(digit, cell) for digit, place in enumerate(places) if place >> cell & 1]


def _grid(places: _Places) -> Grid:
    cells = {cell: digit for digit, place in enumerate(places, 1) for cell in _cells(place)}
    return tuple(cells[cell] for cell in range(len(cells)))


def _random_solution(numbers: random.Random, size: int) -> Grid:
    first_row = _shuffled(numbers, range(1, size + 1))
    places, empty = _state([*first_row, *[0] * (size * size - size)])
    return _grid(next(_search(places, empty, _board(size), numbers)))


def _is_implied(puzzle: list[int], cell: int) -> bool:
    """Whether a puzzle with one solution still has one without the given of this cell: with no other digit there can
    it be solved."""
    digit = puzzle[cell]
    places, empty = _state([*puzzle[:cell], 0, *puzzle[cell + 1 :]])
    places[digit - 1] &= ~(1 << cell)
    return next(_search(places, empty, _board(size_of(puzzle))), None) is None


def _from_line(text: str) -> Grid | None:
    is_grid = len(text) in {size * size for size in SIZES} and set(text) <= set(".0123456789")
    return tuple(map(int, text.replace(".", "0"))) if is_grid else None


def _from_rows(rows: Any) -> Grid | None:
    if not isinstance(rows, list) or len(rows) not in SIZES:
        return None
    if not all(isinstance(row, list) and len(row) == len(rows) for row in rows):
        return None
    cells = [cell for row in rows for cell in row]
    is_grid = all(isinstance(cell, int) and not isinstance(cell, bool) and cell >= 0 for cell in cells)
    return tuple(cells) if is_grid else None


def _shuffled(numbers: random.Random, items: Iterable[Any]) -> list[Any]:
    left = list(items)
    return [left.pop(below(numbers, len(left))) for _ in range(len(left))]


def _cells(mask: int) -> Iterator[int]:
    while mask:
        yield _first(mask)
        mask &= mask - 1


def _first(mask: int) -> int:
    return (mask & -mask).bit_length() - 1


def _mask(cells: Iterable[int]) -> int:
    return sum(1 << cell for cell in cells)
