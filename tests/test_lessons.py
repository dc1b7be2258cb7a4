"""What the tiny model is taught: right solutions of training problems, half of them with a number left over."""

from __future__ import annotations

from collections import Counter

import pytest

from es_engine.config.tasks import CountdownTaskConfig
from rewards.countdown_problems import split_of
from rewards.expressions import evaluate, literals, parse
from rewards.prompts import PLAIN_ALPHABET
from workers.lessons import Lesson, lessons

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
