"""What the tiny model is taught: training problems, solved by the rules or, half of them, by another rule."""

from __future__ import annotations

from collections import Counter

import pytest

from es_engine.config.tasks import CountdownTaskConfig, SudokuTaskConfig
from rewards.countdown_problems import split_of
from rewards.expressions import evaluate, literals, parse
from rewards.prompts import PLAIN_ALPHABET
from rewards.sudoku_grids import is_complete, keeps
from rewards.sudoku_grids import parse as parse_grid
from workers.lessons import Lesson, alphabet, lessons

MANY = 600


def read(lesson: Lesson) -> tuple[list[int], str, Counter[int]]:
    """The given numbers, the target, and the numbers that the solution uses; its value is the target."""
    prompt, completion = lesson
    numbers, _, target = prompt.removesuffix(":").partition("=")
    expression = parse(completion)
    assert evaluate(expression) == int(target)
    return [int(number) for number in numbers.split()], target, Counter(literals(expression))


@pytest.mark.parametrize("counts", [(3,), (3, 4), (2,)])
def test_lessons_are_right_and_leave_at_most_one_number_over(counts: tuple[int, ...]) -> None:
    lesson = lessons(CountdownTaskConfig(numbers=counts, template="plain"))
    left_over = 0
    for index in range(MANY):
        assert set("".join(lesson(index))) <= set(PLAIN_ALPHABET)
        numbers, target, used = read(lesson(index))
        assert split_of({"numbers": numbers, "target": target}) == "train"
        rest = Counter(numbers) - used
        assert used <= Counter(numbers)
        assert sum(rest.values()) <= 1
        left_over += sum(rest.values())
        assert len(numbers) - sum(rest.values()) in (*counts, *(max(2, count - 1) for count in counts))
    # Binomial(600, 1/2): outside 4.5 standard deviations once in 150,000.
    assert abs(left_over - MANY / 2) < 4.5 * (MANY / 4) ** 0.5


def test_a_lesson_is_the_same_whenever_it_is_asked_for() -> None:
    config = CountdownTaskConfig(template="plain")
    once, again = lessons(config), lessons(config)
    assert [once(index) for index in (5, 0, 99)] == [again(index) for index in (5, 0, 99)]
    assert len({once(index) for index in range(100)}) > 95


@pytest.mark.parametrize("kind", [CountdownTaskConfig, SudokuTaskConfig])
def test_lessons_are_plain_whatever_the_template_of_the_task(
    kind: type[CountdownTaskConfig] | type[SudokuTaskConfig],
) -> None:
    plain = lessons(kind(template="plain"))
    for template in ("chat", "r1"):
        lesson = lessons(kind(template=template))
        assert [lesson(index) for index in range(20)] == [plain(index) for index in range(20)]


def test_sudokus_are_solved_or_filled_in_by_rows() -> None:
    config = SudokuTaskConfig(template="plain")
    lesson, task = lessons(config), config.build()
    heldout = {task.example("heldout", index).info["puzzle"] for index in range(MANY)}
    solved = 0
    for index in range(MANY):
        prompt, completion = lesson(index)
        assert set(prompt + completion) <= set(alphabet(config))
        puzzle, grid = parse_grid(prompt.removesuffix(":")), parse_grid(completion)
        assert prompt.removesuffix(":") not in heldout
        assert keeps(grid, puzzle)
        assert all(set(grid[start : start + 4]) == {1, 2, 3, 4} for start in range(0, 16, 4))
        solved += is_complete(grid)
    # A lesson by rows is solved by chance in about one of ten, so 0.5 to 0.6 of all are; Binomial(600, p) is further
    # than 0.1 from there once in a million.
    assert 0.4 < solved / MANY < 0.7
