"""ARC-AGI-1 (Chollet, "On the Measure of Intelligence", arXiv:1911.01547): find the rule that turns grids into grids.

A problem is a file of the ARC-AGI repositories, {"train": [{"input": grid, "output": grid}, ...], "test": [...]}; a
grid is a list of rows of the digits 0 to 9, at most 30 by 30. The answer must give every test output.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from rewards.answers import extract
from rewards.base import Example, Rollout, Score, Split, Verifier, register
from rewards.problems import FiledProblems, Row
from rewards.weights import checked_weights, weighted_verifier

Template = Literal["chat", "plain"]
Grid = list[list[int]]

WEIGHTS = {"format": 0.1, "shape": 0.1, "cells": 0.2, "solved": 0.6}
MAX_SIDE = 30

_TASK = (
    "Each example below shows an input grid and the output grid that one fixed rule makes of it. A grid is written as "
    "rows of digits, and every digit stands for a colour. Find the rule and apply it to the test input."
)
_REPLY = (
    "Reply with the output grid of each test input, in their order, between <answer> and </answer>: "
    "a row of digits on each line, and an empty line between two grids."
)


class Arc:
    """The arc task: problems from a folder of JSON files, one a problem.

    Args:
        data: the folder; a file's name without .json is the problem's id, whose hash decides its split.
        heldout_data: another folder of held-out problems; without it, those of the first are split.
        max_cells: the most cells that a problem's grids, test outputs too, may have together; larger problems are left
            out, as are those of the held-out folder. None: all are kept. A cell is about a token, a row one more.
        template: `chat` or `plain` (for a model without roles).
        seed: of the problems' order. It does not move a problem from one split to the other.
        max_tokens, stop: for generation; left out, 2048 tokens and no stop.
        verifier: a user's own (see `VerifierSpec`) in place of `arc`.
        weights: of the reward's components (see `arc_verifier`).

    Raises ValueError, naming the field, for values that give no problems or contradict each other.
    """

    def __init__(
        self,
        *,
        data: str | Path,
        heldout_data: str | Path | None = None,
        max_cells: int | None = None,
        template: Template = "chat",
        seed: int = 0,
        max_tokens: int | None = None,
        stop: Sequence[str] | None = None,
        verifier: str | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        if template not in get_args(Template):
            raise ValueError(f"task.template: {template!r} is not one of {', '.join(get_args(Template))}")
        self.max_tokens = 2048 if max_tokens is None else max_tokens
        self.stop = () if stop is None else tuple(stop)
        self.verifier = weighted_verifier("arc", verifier, weights, WEIGHTS, {})
        self._template = template
        heldout = None if heldout_data is None else read_folder(Path(heldout_data), "task.heldout_data", max_cells)
        rows = read_folder(Path(data), "task.data", max_cells)
        self._problems = FiledProblems(rows, heldout, lambda row: str(row["id"]), seed, str(data))
        self.rows: int | None = self._problems.training_rows

    def example(self, split: Split, index: int) -> Example:
        """Problem number `index` (from 0) of a split; a pure function of its arguments.

        The answer is the test outputs as `print_grids` writes them, and `info` the problem with its `id`.
        """
        row = self._problems.row(split, index)
        answer = print_grids(_test_outputs(row))
        if self._template == "chat":
            return Example(row["id"], answer, row, messages=({"role": "user", "content": _prompt(row)},))
        return Example(row["id"], answer, row, prompt=f"{_prompt(row)}\n")

    def worked_solution(self, example: Example) -> str:
        """A completion with the right grids."""
        return f"<answer>\n{example.answer}\n</answer>"


@register("arc")
def arc_verifier(weights: Mapping[str, float] | None = None) -> Verifier:
    """The verifier of ARC answers. A rollout's `info` has the `test` pairs; the answer is the last
    <answer>...</answer>, read by `parse_grids`.

    It is solved if its grids are the test outputs, all of them and in their order; that is `accuracy`, 0 or 1. The
    reward is the sum of four components, each its weight times:

    format: 1 if there are as many grids as test inputs, each a rectangle of at most 30 by 30. Else all are 0.
    shape: the share of grids with the right height and width.
    cells: the share of right cells: those with the same digit at the same place, over the cells of the larger of the
        two grids, of all test outputs together.
    solved: 1 if solved.

    The weights default to `WEIGHTS`. Most of a grid is right where the input is copied: keep the weight of cells low.
    """
    scale = checked_weights(weights, WEIGHTS)

    def verify(rollout: Rollout) -> Score:
        text = extract(rollout.completion, "answer")
        grades = _grades(parse_grids(text or ""), _test_outputs(rollout.info))
        components = {name: scale[name] * grade for name, grade in grades.items()}
        return Score(sum(components.values()), components, accuracy=grades["solved"])

    return verify


def print_grids(grids: Sequence[Grid]) -> str:
    """Grids as text: a row of digits on each line, an empty line between two grids."""
    return "\n\n".join("\n".join("".join(map(str, row)) for row in grid) for grid in grids)


def parse_grids(text: str) -> list[Grid]:
    """The grids in a text, whatever their shape.

    A line of nothing but the digits 0 to 9, with or without spaces between them, is a row; rows on successive lines
    make a grid, and any other line ends it. Linear in the text's length.
    """
    grids: list[Grid] = []
    in_grid = False
    for line in text.split("\n"):
        digits = "".join(line.split())
        is_row = digits.isascii() and digits.isdigit()
        if is_row and not in_grid:
            grids.append([])
        if is_row:
            grids[-1].append([int(digit) for digit in digits])
        in_grid = is_row
    return grids


def read_folder(folder: Path, field: str, max_cells: int | None = None) -> list[Row]:
    """The problems of a folder's JSON files, in the order of their names, each with its `id`; those of more than
    `max_cells` cells are left out. Raises ValueError naming `field` and file."""
    if not folder.is_dir():
        raise ValueError(f"{field}: no folder {folder}")
    files = sorted(folder.glob("*.json"))
    if not files:
        raise ValueError(f"{field}: {folder} has no .json file")
    rows = [_read(file, f"{field}: {file}") for file in files]
    kept = [row for row in rows if max_cells is None or cells(row) <= max_cells]
    if not kept:
        raise ValueError(
            f"task.max_cells: {max_cells} leaves out all of {folder}; the least is {min(map(cells, rows))}"
        )
    return kept


def cells(row: Mapping[str, Any]) -> int:
    """The cells of all grids of a problem, inputs and outputs."""
    pairs = [*row["train"], *row["test"]]
    return sum(len(line) for pair in pairs for grid in (pair["input"], pair["output"]) for line in grid)


def _prompt(row: Row) -> str:
    shown = [
        f"Example {number}, input:\n{print_grids([pair['input']])}\nExample {number}, output:\n"
        f"{print_grids([pair['output']])}"
        for number, pair in enumerate(row["train"], 1)
    ]
    asked = [f"Test {number}, input:\n{print_grids([pair['input']])}" for number, pair in enumerate(row["test"], 1)]
    return "\n\n".join([_TASK, *shown, *asked, _REPLY])


def _test_outputs(row: Mapping[str, Any]) -> list[Grid]:
    return [pair["output"] for pair in row["test"]]


def _grades(given: Sequence[Grid], wanted: Sequence[Grid]) -> dict[str, float]:
    if len(given) != len(wanted) or not all(map(_is_grid, given)):
        return {"format": 0.0, "shape": 0.0, "cells": 0.0, "solved": 0.0}
    pairs = list(zip(given, wanted, strict=True))
    same_shape = [_shape(one) == _shape(other) for one, other in pairs]
    larger = [max(math.prod(_shape(one)), math.prod(_shape(other))) for one, other in pairs]
    right = sum(
        mine == theirs
        for one, other in pairs
        for row, wanted_row in zip(one, other, strict=False)
        for mine, theirs in zip(row, wanted_row, strict=False)
    )
    return {
        "format": 1.0,
        "shape": sum(same_shape) / len(pairs),
        "cells": right / sum(larger),
        "solved": float(list(given) == list(wanted)),
    }


def _shape(grid: Grid) -> tuple[int, int]:
    return len(grid), len(grid[0])


def _is_grid(grid: Any) -> bool:
    """Whether it is a rectangle of digits, of 1 to 30 rows and columns."""
    return (
        isinstance(grid, list)
        and 1 <= len(grid) <= MAX_SIDE
        and all(isinstance(row, list) and 1 <= len(row) <= MAX_SIDE and len(row) == len(grid[0]) for row in grid)
        and all(type(cell) is int and 0 <= cell <= 9 for row in grid for cell in row)
    )


def _read(file: Path, place: str) -> Row:
    try:
        problem = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON ({error})") from None
    if not isinstance(problem, dict):
        raise ValueError(f"{place} is not an object with `train` and `test`")
    for part in ("train", "test"):
        pairs = problem.get(part)
        if not isinstance(pairs, list) or not pairs or not all(map(_is_pair, pairs)):
            raise ValueError(
                f"{place}: `{part}` is {pairs!r:.60}; accepted is a list of one or more pairs of `input` and `output`, "
                f"each a grid of digits of at most {MAX_SIDE} by {MAX_SIDE}"
            )
    return {"id": file.stem, "train": problem["train"], "test": problem["test"]}


def _is_pair(pair: object) -> bool:
    return isinstance(pair, dict) and _is_grid(pair.get("input")) and _is_grid(pair.get("output"))
