"""Countdown's solver, and how many solutions a problem has, against trying everything."""

from __future__ import annotations

import random
from collections import Counter
from fractions import Fraction
from itertools import permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.countdown_solver import count_solutions, solve
from rewards.expressions import Binary, Expression, evaluate, literals


@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_the_solver_finds_a_solution_exactly_where_there_is_one(numbers: list[int], target: int) -> None:
    found = solve(numbers, Fraction(target))
    assert (found is not None) == (target in every_value([Fraction(number) for number in numbers]))
    if found is not None:
        assert evaluate(found) == target
        assert sorted(literals(found)) == sorted(numbers)


@pytest.mark.parametrize("numbers", [(7, 11, 13, 17, 19), (7, 11, 13, 17, 19, 23), (2, 2, 5, 7, 11, 13)])
def test_the_solver_finds_what_was_hidden_in_more_numbers(numbers: tuple[int, ...]) -> None:
    for symbols in product("+-*/", repeat=2):
        hidden: Expression = numbers[0]
        for position, number in enumerate(numbers[1:]):
            hidden = Binary(symbols[position % 2], hidden, number)
        found = solve(numbers, evaluate(hidden))
        assert found is not None
        assert evaluate(found) == evaluate(hidden)
        assert sorted(literals(found)) == sorted(numbers)


def test_the_solver_multiplies_a_zero_by_whatever_is_left() -> None:
    found = solve((2, 2, 50, 301, 7001), Fraction(0))  # only 2-2 is zero here
    assert found is not None
    assert evaluate(found) == 0


@given(st.lists(st.integers(0, 6), min_size=1, max_size=4), st.data())
@settings(max_examples=40, deadline=None)
def test_solutions_are_counted_as_every_expression_says(numbers: list[int], data: st.DataObject) -> None:
    expected = count_by_trying_every_expression(numbers)
    for value in [*data.draw(st.lists(st.sampled_from(sorted(expected)), max_size=8)), Fraction(1, 97)]:
        assert count_solutions(numbers, value) == expected.get(value, 0)


def test_numbers_without_repeats_make_as_many_functions_as_are_known() -> None:
    """1, 6, 68, 1170: sequence A140606 of the OEIS."""
    for numbers, functions in (((7,), 1), ((7, 50), 6), ((7, 50, 301), 68), ((7, 50, 301, 4001), 1170)):
        expected = count_by_trying_every_expression(list(numbers))
        assert sum(expected.values()) == functions


@pytest.mark.parametrize(
    ("numbers", "target", "count"),
    [
        ((2, 2), 4, 2),  # 2+2 and 2*2
        ((2, 2), 0, 1),  # 2-2
        ((50, 3, 2), 49, 1),  # 50-(3-2), which is 50-3+2 and 2-(3-50)
        ((64, 8, 2), 16, 1),  # 64/(8/2), which is 64/8*2 and 2/(8/64)
        ((9, 4, 20, 13), 35, 1),  # (9-4)*(20-13), which is (4-9)*(13-20)
        ((3, 1, 5), 15, 2),  # 5*3*1 and 5*3/1
        ((25, 50, 75, 100, 3, 6), 952, 6),
    ],
)
def test_what_counts_once(numbers: tuple[int, ...], target: int, count: int) -> None:
    assert count_solutions(numbers, Fraction(target)) == count


@given(st.lists(st.integers(1, 20), min_size=5, max_size=5), st.integers(1, 100))
@settings(max_examples=15, deadline=None)
def test_there_is_a_solution_where_one_is_counted(numbers: list[int], target: int) -> None:
    assert (solve(numbers, Fraction(target)) is None) == (count_solutions(numbers, Fraction(target)) == 0)


def count_by_trying_every_expression(numbers: list[int]) -> dict[Fraction, int]:
    """The number of solutions for each value, by the definition: every expression, as a function of unknowns.

    A function is known by its values at a random place modulo a prime, and those after each exchange of equal numbers.
    """
    prime = 2**61 - 1
    stream = random.Random(0)
    unknowns = [stream.randrange(prime) for _ in numbers]
    exchanges = [
        order
        for order in permutations(range(len(numbers)))
        if all(numbers[place] == numbers[at] for at, place in enumerate(order))
    ]
    worth: dict[int, set[tuple[Fraction, tuple[int, ...]]]] = {
        1 << place: {(Fraction(number), tuple(unknowns[order[place]] for order in exchanges))}
        for place, number in enumerate(numbers)
    }
    everything = (1 << len(numbers)) - 1
    for chosen in range(1, everything + 1):
        for part in range(1, chosen):
            if part & chosen != part:
                continue
            for (a, x), (b, y) in product(worth[part], worth[chosen ^ part]):
                made = worth.setdefault(chosen, set())
                made.add((a + b, tuple((i + j) % prime for i, j in zip(x, y, strict=True))))
                made.add((a - b, tuple((i - j) % prime for i, j in zip(x, y, strict=True))))
                made.add((a * b, tuple(i * j % prime for i, j in zip(x, y, strict=True))))
                if b != 0:
                    made.add((a / b, tuple(i * pow(j, -1, prime) % prime for i, j in zip(x, y, strict=True))))
    return Counter(value for value, _ in {(value, frozenset(images)) for value, images in worth[everything]})


def every_value(values: list[Fraction]) -> set[Fraction]:
    """What all the values together can make, by trying every pair, operation and order."""
    if len(values) == 1:
        return set(values)
    reached: set[Fraction] = set()
    for i, j in permutations(range(len(values)), 2):
        a, b = values[i], values[j]
        rest = [value for k, value in enumerate(values) if k not in (i, j)]
        for made in {a + b, a - b, a * b} | ({a / b} if b else set()):
            reached |= every_value([made, *rest])
    return reached
