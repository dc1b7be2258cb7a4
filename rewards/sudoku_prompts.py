"""How a Sudoku is put to a model. A template is a function of the puzzle."""

from __future__ import annotations

from math import isqrt

from rewards.sudoku_grids import Grid, size_of, to_line, to_rows

# Every character of a `plain` prompt and of a worked solution to it, the closing newline included.
PLAIN_ALPHABET = "\n.123456789:"


def plain(puzzle: Grid) -> str:
    """A character tokenizer's form, such as `1.3..4.2...:`; the full grid and a newline follow."""
    return f"{to_line(puzzle)}:"


def chat(puzzle: Grid) -> str:
    """What the user says to a chat model; the full grid alone is the reply."""
    return f"{_task(puzzle)}\nReply with the full grid in the same form, and nothing else."


def r1(puzzle: Grid) -> str:
    """The model thinks first, and the prompt has already opened its <think>."""
    return (
        f"{_task(puzzle)}\nThink inside <think> </think>, then give the full grid in the same form inside "
        "<answer> </answer>.\n<think>"
    )


def _task(puzzle: Grid) -> str:
    size, box = size_of(puzzle), isqrt(size_of(puzzle))
    return (
        f"Here is a Sudoku of {size} rows and {size} columns, with a dot for each empty cell:\n\n{to_rows(puzzle)}\n\n"
        f"Fill in the empty cells so that every row, every column and every {box}x{box} box holds each of the digits "
        f"1 to {size} exactly once."
    )
