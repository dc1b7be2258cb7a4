"""Where Countdown problems come from: a seeded generator, and files.

A problem is a row `{"numbers": [3, 7, 2], "target": "27", ...}`. A hash of its sorted numbers and its target assigns it
to the training or the held-out split, the same for every seed and source, so the two can never share a problem.
"""

from __future__ import annotations

import random
import re
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from rewards.base import Split
from rewards.countdown_solver import count_solutions
from rewards.expressions import MAX_DIGITS, MAX_NUMBERS, OPERATIONS, Binary, Expression, to_text
from rewards.problems import DrawnProblems, FiledProblems, Row, below, pick, read_records, split_of_key
from rewards.prompts import WORKED

_DECIMAL = re.compile(r"-?[0-9]{1,12}(\.[0-9]{1,20})?")


@dataclass(frozen=True, slots=True)
class Settings:
    """What the generator makes, in the words of `Countdown`."""

    numbers: tuple[int, ...] = (3,)
    low: int = 1
    high: int = 20
    operations: str = "+-*/"
    targets: tuple[int, int] = (1, 100)
    solutions: tuple[int, int] | None = None

    def check(self, field: str) -> None:
        """Raises ValueError, naming the setting as part of `field`, for one that makes no sense."""
        numbers, low, high, operations, targets = self.numbers, self.low, self.high, self.operations, self.targets
        if not numbers or not all(2 <= count <= 6 for count in numbers):
            raise ValueError(f"{field}.numbers: {numbers} must be one or more counts of 2 to 6 numbers")
        if not 1 <= low <= high <= 1_000_000:
            raise ValueError(f"{field}.low: {low} to {high} ({field}.high) is no range within 1 to 1000000")
        if not operations or len(set(operations)) < len(operations) or not set(operations) <= set(OPERATIONS):
            raise ValueError(
                f"{field}.operations: {operations!r} must be one or more of {''.join(OPERATIONS)}, each once"
            )
        if not 1 <= targets[0] <= targets[1]:
            raise ValueError(f"{field}.targets: {targets} is no range of positive whole numbers")
        if self.solutions is not None and not 1 <= self.solutions[0] <= self.solutions[1]:
            raise ValueError(f"{field}.solutions: {self.solutions} is no range of positive whole numbers")


def generated(settings: Settings, seed: int, field: str = "task") -> DrawnProblems:
    """Random problems that can be solved, since each target is the value of a random expression of all its numbers.

    Where there is a range of `solutions`, they are counted, and a row says how many under `solutions`. Raises
    ValueError, naming `field`, for settings that make no sense.
    """
    settings.check(field)
    targets, solutions = settings.targets, settings.solutions

    def draw(stream: random.Random) -> Row | None:
        numbers, value, expression = _random_expression(stream, settings)
        if value.denominator == 1 and targets[0] <= value <= targets[1]:
            return {"numbers": numbers, "target": str(value), "solution": to_text(expression)}
        return None

    def finish(row: Row) -> Row | None:
        if solutions is None:
            return row
        count = count_solutions(row["numbers"], Fraction(row["target"]))
        return {**row, "solutions": count} if solutions[0] <= count <= solutions[1] else None

    given = ", ".join(f"{name}={value!r}" for name, value in asdict(settings).items() if value is not None)
    return DrawnProblems(draw, problem_key, seed, given, _split_of_key, finish, field)


def filed(data: Path, heldout_data: Path | None, with_context: bool, seed: int) -> FiledProblems:
    """Problems from files (see `read_rows` and `FiledProblems`)."""
    rows = read_rows(data, "task.data", with_context)
    heldout = None if heldout_data is None else read_rows(heldout_data, "task.heldout_data", with_context)
    return FiledProblems(rows, heldout, problem_key, seed, str(data), _split_of_key)


def _random_expression(stream: random.Random, settings: Settings) -> tuple[list[int], Fraction, Expression]:
    """Numbers, and random operations on random pairs of them until one value is left: as people play it, the larger
    operand first, so that nothing is negative."""
    low, high, operations = settings.low, settings.high, settings.operations
    numbers = [low + below(stream, high - low + 1) for _ in range(pick(stream, settings.numbers))]
    left: list[tuple[Fraction, Expression]] = [(Fraction(number), number) for number in numbers]
    while len(left) > 1:
        pair = [left.pop(below(stream, len(left))) for _ in range(2)]
        (a, first), (b, second) = sorted(pair, key=lambda item: item[0], reverse=True)
        symbol = pick(stream, [each for each in operations if each != "/" or b != 0])
        left.append((OPERATIONS[symbol](a, b), Binary(symbol, first, second)))
    return numbers, *left[0]


def problem_key(row: Row) -> str:
    """The problem whatever the order of its numbers and the spelling of its target, such as `2,3,7=27`."""
    return f"{','.join(map(str, sorted(row['numbers'])))}={Fraction(row['target'])}"


def split_of(row: Row) -> Split:
    """The split of a problem: three in ten are held out, but none that a few-shot prompt shows solved."""
    return _split_of_key(problem_key(row))


def _split_of_key(key: str) -> Split:
    return "train" if key in _SHOWN else split_of_key(key)


def read_rows(path: Path, field: str, with_context: bool) -> list[Row]:
    """The rows of a file of JSON lines or of one JSON list, with `target` as a string.

    Each has `numbers` (a list of whole numbers) and `target` (a number, or one as a string); the published data also
    has the prompt under `context`, wanted of every row if `with_context`, and an expression under `solution`. Raises
    ValueError naming `field`, file and row.
    """
    return [_checked(record, place, with_context) for place, record in read_records(path, field)]


def _checked(record: Any, place: str, with_context: bool) -> Row:
    if not isinstance(record, dict):
        raise ValueError(f"{place} is not an object with `numbers` and `target`")
    numbers, target = record.get("numbers"), record.get("target")
    if not (isinstance(numbers, list) and 1 <= len(numbers) <= MAX_NUMBERS and all(map(_is_usable, numbers))):
        raise ValueError(
            f"{place}: `numbers` is {numbers!r:.60}; accepted is a list of 1 to {MAX_NUMBERS} whole numbers "
            f"of up to {MAX_DIGITS} digits"
        )
    if isinstance(target, bool) or not _DECIMAL.fullmatch(str(target)):
        raise ValueError(f"{place}: `target` is {target!r:.60}; accepted is a number such as 27 or '27.4'")
    if with_context and not isinstance(record.get("context"), str):
        raise ValueError(f"{place} has no prompt text in `context`, which task.template=dataset takes")
    return {**record, "target": str(target)}


def _is_usable(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 10**MAX_DIGITS


_SHOWN = frozenset(problem_key({"numbers": list(numbers), "target": target}) for numbers, target, _ in WORKED)
