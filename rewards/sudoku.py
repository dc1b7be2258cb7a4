"""Sudoku: fill in the empty cells so that every row, column and box holds every digit once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from rewards import sudoku_prompts as prompts
from rewards.base import Example, Rollout, Score, Split, Verifier, register
from rewards.problems import Problems, staged
from rewards.r1 import format_grade, last_answer
from rewards.sudoku_grids import SIZES, Grid, is_complete, keeps, parse, size_of, to_line, to_rows
from rewards.sudoku_problems import FiledPuzzles, generated, problem_key
from rewards.weights import checked_weights, weighted_verifier

Template = Literal["plain", "chat", "r1"]
Size = Literal[4, 9]

WEIGHTS = {"format": 0.1, "givens": 0.1, "cells": 0.3, "solved": 0.5}
SEPARATORS = " \t\r\n|-+"
"""What may stand between the cells of an answer."""

_MAX_TOKENS: dict[Template, dict[int, int]] = {
    "plain": {4: 20, 9: 90},
    "chat": {4: 64, 9: 256},
    "r1": {4: 1024, 9: 4096},
}
_WITHOUT_SEPARATORS = str.maketrans("", "", SEPARATORS)


class Sudoku:
    """The Sudoku task: puzzles with exactly one solution, from a seeded generator or from files where `data` is given.

    Args:
        size: 4 (boxes of 2x2) or 9 (boxes of 3x3).
        blanks: the least and the most empty cells of a generated puzzle, up to 12 of 16 and 58 of 81.
        curriculum: stages that the first training problems go through, each a mapping with its number of `problems` and
            its `blanks`.
        template: `plain` (for a character tokenizer), `chat`, or `r1` (<think>, <answer>).
        seed: of the problems' choice and order. It does not move a problem from one split to the other.
        max_tokens, stop: for generation; left out, what suits the template and the size.
        data, heldout_data: files of puzzles (see `read_rows`); without the second, rows of the first are held out.
        verifier: a user's own (see `VerifierSpec`) in place of `sudoku`.
        weights: of the reward's components (see `sudoku_verifier`).

    Raises ValueError, naming the field, for values that give no problems or contradict each other.
    """

    def __init__(
        self,
        *,
        size: Size = 4,
        blanks: tuple[int, int] = (4, 8),
        curriculum: Sequence[Mapping[str, Any]] = (),
        template: Template = "chat",
        seed: int = 0,
        max_tokens: int | None = None,
        stop: Sequence[str] | None = None,
        data: str | Path | None = None,
        heldout_data: str | Path | None = None,
        verifier: str | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        _check(size, template, data, heldout_data, curriculum)
        self.max_tokens = _MAX_TOKENS[template][size] if max_tokens is None else max_tokens
        self.stop = (("\n",) if template == "plain" else ()) if stop is None else tuple(stop)
        self.verifier = weighted_verifier("sudoku", verifier, weights, WEIGHTS, {"form": template})
        self._template = template
        self._problems: Problems
        if data is None:
            self._problems = staged(
                curriculum, ["blanks"], lambda stage, field: generated(size, stage.get("blanks", blanks), seed, field)
            )
        else:
            heldout_path = None if heldout_data is None else Path(heldout_data)
            self._problems = FiledPuzzles(Path(data), heldout_path, size, seed)
        self.rows: int | None = None
        for split in get_args(Split):
            self.example(split, 0)  # settings that allow no problem are refused here, not in the middle of a run

    def example(self, split: Split, index: int) -> Example:
        """Problem number `index` (from 0) of a split; a pure function of its arguments.

        The answer is the solution as a line, and `info` the row: `puzzle` and `solution` as lines, and what else the
        source gave. Raises ValueError, naming file and line, for a puzzle from a file that has not exactly one
        solution.
        """
        row = self._problems.row(split, index)
        puzzle, identity, answer = parse(row["puzzle"]), problem_key(row), row["solution"]
        match self._template:
            case "plain":
                return Example(identity, answer, row, prompt=prompts.plain(puzzle))
            case "chat":
                return Example(identity, answer, row, messages=({"role": "user", "content": prompts.chat(puzzle)},))
            case "r1":
                return Example(identity, answer, row, prompt=prompts.r1(puzzle))

    def worked_solution(self, example: Example) -> str:
        """A completion that solves the example, in the template's form and without the closing newline."""
        solution = parse(example.answer)
        match self._template:
            case "plain":
                return to_line(solution)
            case "chat":
                return to_rows(solution)
            case "r1":
                blanks = zip(solution, parse(example.info["puzzle"]), strict=True)
                filled = " ".join(str(digit) for digit, given in blanks if given == 0)
                thought = f" From left to right and top to bottom, the empty cells are {filled}. "
                return f"{thought}</think>\n<answer>\n{to_rows(solution)}\n</answer>"


@register("sudoku")
def sudoku_verifier(form: Template = "plain", weights: Mapping[str, float] | None = None) -> Verifier:
    """The verifier of a form. A rollout's `info` has `puzzle` and `solution`; a completion cut off is read as it is.

    plain: the first line is the grid. chat: the whole completion is. r1: what the last <answer>...</answer> holds is;
    the prompt has already opened the <think>.

    Of what should be the grid, the `SEPARATORS` (space, tab, line ends, `|`, `-`, `+`) are left out, wherever they
    stand. The rest must be one character for each cell, row by row: an ASCII digit from 1 to the size, or `.` or `0`
    for a cell left empty. Anything else is no grid.

    The answer is solved if each row, column and box holds every digit once and the puzzle's givens are where they were;
    that is `accuracy`, 0 or 1, and found without the stored solution. The reward is the sum of four components, each
    its weight times:

    format: plain, chat: 1 if there is a grid. r1: see `rewards.r1.format_grade`.
    givens: the share of the puzzle's givens that the grid has where they were.
    cells: the share of the puzzle's empty cells in which the grid has the solution's digit.
    solved: 1 if solved.

    The weights default to `WEIGHTS`.
    """
    if form not in get_args(Template):
        raise ValueError(f"verifier: form is {form!r}; accepted are {', '.join(get_args(Template))}")
    scale = checked_weights(weights, WEIGHTS)

    def verify(rollout: Rollout) -> Score:
        grades = _judge(rollout.completion, form, parse(rollout.info["puzzle"]), parse(rollout.info["solution"]))
        components = {name: scale[name] * grade for name, grade in grades.items()}
        return Score(sum(components.values()), components, accuracy=grades["solved"])

    return verify


def read_answer(text: str, size: int) -> Grid | None:
    """The grid that a text holds by the rule of `sudoku_verifier`, or None; found in linear time."""
    cells = text.translate(_WITHOUT_SEPARATORS)
    if len(cells) != size * size:
        return None
    try:
        return parse(cells)
    except ValueError:
        return None


def _judge(completion: str, form: Template, puzzle: Grid, solution: Grid) -> dict[str, float]:
    grid = read_answer(_answer(completion, form), size_of(puzzle))
    formed = format_grade(f"<think>{completion}") if form == "r1" else float(grid is not None)
    if grid is None:
        return {"format": formed, "givens": 0.0, "cells": 0.0, "solved": 0.0}
    kept = [cell == given for cell, given in zip(grid, puzzle, strict=True) if given]
    filled = [cell == wanted for cell, wanted, given in zip(grid, solution, puzzle, strict=True) if not given]
    return {
        "format": formed,
        "givens": sum(kept) / len(kept),
        "cells": sum(filled) / len(filled),
        "solved": float(is_complete(grid) and keeps(grid, puzzle)),
    }


def _answer(completion: str, form: Template) -> str:
    match form:
        case "plain":
            return completion.partition("\n")[0]
        case "chat":
            return completion
        case "r1":
            return last_answer(f"<think>{completion}") or ""


def _check(
    size: int, template: str, data: object, heldout_data: object, curriculum: Sequence[Mapping[str, Any]]
) -> None:
    if size not in SIZES:
        raise ValueError(f"task.size: {size} is not one of {', '.join(map(str, SIZES))}")
    if template not in get_args(Template):
        raise ValueError(f"task.template: {template!r} is not one of {', '.join(get_args(Template))}")
    if heldout_data is not None and data is None:
        raise ValueError("task.heldout_data: it goes with task.data, which is not given")
    if curriculum and data is not None:
        raise ValueError("task.curriculum: it is for generated problems; leave it out, or else task.data")
