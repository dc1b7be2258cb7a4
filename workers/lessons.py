"""What the tiny model is taught before a run: worked problems, half of them by another rule than the task's.

So the model can play and still has something to learn that no single lesson tells it: as with pretrained models, what
a run rewards is only one of its habits. Of Countdown the other rule is the television game's, by which a number may be
left over; of Sudoku it is that of the rows alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from math import isqrt

from es_engine.config.tasks import CountdownTaskConfig, LessonsTaskConfig, SudokuTaskConfig
from rewards import prompts, sudoku_prompts
from rewards.base import Task
from rewards.countdown import Countdown
from rewards.countdown_problems import split_of
from rewards.sudoku import Sudoku
from rewards.sudoku_grids import Grid, parse, to_line

Lesson = tuple[str, str]  # prompt, completion
Lessons = Callable[[int], Lesson]

OTHER_RULE = 0.5
"""Share of the lessons that go by the other rule."""

DRAWS = 8
"""Problems looked through for one that is not held out; each is with probability 0.3, so all are once in 15,000."""


def lessons(config: LessonsTaskConfig) -> Lessons:
    """Lesson number i of a task in its plain template, from training problems only."""
    return _countdown(config) if isinstance(config, CountdownTaskConfig) else _sudoku(config)


def alphabet(config: LessonsTaskConfig) -> str:
    """Every character of a task's prompts and answers in its plain template."""
    return prompts.PLAIN_ALPHABET if isinstance(config, CountdownTaskConfig) else sudoku_prompts.PLAIN_ALPHABET


def _countdown(config: CountdownTaskConfig) -> Lessons:
    config = config.model_copy(update={"template": "plain"})
    every_number = _countdown_task(config)
    fewer = tuple(max(2, count - 1) for count in config.numbers)
    one_over = _countdown_task(config.model_copy(update={"numbers": fewer, "data": None, "heldout_data": None}))

    def lesson(index: int) -> Lesson:
        stream = random.Random(f"lesson {index}")
        if stream.random() < OTHER_RULE:
            return _with_one_over(one_over, index, stream, config.low, config.high)
        example = every_number.example("train", index)
        assert example.prompt is not None
        return example.prompt, every_number.worked_solution(example)

    return lesson


def _with_one_over(task: Countdown, index: int, stream: random.Random, low: int, high: int) -> Lesson:
    """A solved problem whose prompt shows a further number, somewhere among the others."""
    for draw in range(DRAWS):
        example = task.example("train", DRAWS * index + draw)
        numbers, target = list(example.info["numbers"]), str(example.info["target"])
        further = low + int(stream.random() * (high - low + 1))
        numbers.insert(int(stream.random() * (len(numbers) + 1)), further)
        if split_of({"numbers": numbers, "target": target}) == "train":
            break
    return prompts.plain(numbers, target), task.worked_solution(example)


def _countdown_task(config: CountdownTaskConfig) -> Countdown:
    task: Task = config.build()
    assert isinstance(task, Countdown)
    return task


def _sudoku(config: SudokuTaskConfig) -> Lessons:
    task: Task = config.build()
    assert isinstance(task, Sudoku)

    def lesson(index: int) -> Lesson:
        stream = random.Random(f"lesson {index}")
        example = task.example("train", index)
        puzzle = parse(example.info["puzzle"])
        by_rows = stream.random() < OTHER_RULE
        filled = _with_full_rows(puzzle, stream) if by_rows else parse(example.answer)
        return sudoku_prompts.plain(puzzle), to_line(filled)

    return lesson


def _with_full_rows(puzzle: Grid, stream: random.Random) -> Grid:
    """The puzzle filled in so that every row holds every digit once, whatever its columns and boxes hold."""
    size = isqrt(len(puzzle))
    cells: list[int] = []
    for start in range(0, len(puzzle), size):
        row = puzzle[start : start + size]
        missing = iter(stream.sample(sorted(set(range(1, size + 1)) - set(row)), row.count(0)))
        cells += [digit or next(missing) for digit in row]
    return tuple(cells)
