"""Sudoku as it is published: puzzles, and the rules straight from their wording."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

from rewards.sudoku_grids import Grid, size_of

DATA = Path(__file__).parent / "data" / "sudoku"
FILES = ("twenty_of_10k.txt", "hardest.txt")


def lines(name: str) -> list[str]:
    """The puzzles of one of the files."""
    return (DATA / name).read_text().split()


def obeys_the_rules(grid: Grid) -> bool:
    """Whether every cell is filled, and no row, column or box has a digit twice."""
    size = size_of(grid)
    box = {4: 2, 9: 3}[size]
    for one, other in permutations(range(size * size), 2):
        (row, column), (row_2, column_2) = divmod(one, size), divmod(other, size)
        same_box = (row // box, column // box) == (row_2 // box, column_2 // box)
        if (row == row_2 or column == column_2 or same_box) and grid[one] == grid[other]:
            return False
    return all(1 <= digit <= size for digit in grid)
