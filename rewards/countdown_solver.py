"""What the numbers of a Countdown problem can make: an expression worth the target, and how many of them there are.

Both searches are exhaustive, in rational arithmetic. The values of a few numbers are listed; of more numbers some are
split off, and for each of their values the others are asked for what is missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

from rewards.expressions import OPERATIONS, Binary, Expression

_LISTED = 3  # numbers in the largest sets whose values are listed


def solve(numbers: Sequence[int], target: Fraction) -> Expression | None:
    """An expression of all the numbers (each once, + - * /) worth exactly the target, or None where there is none.

    Milliseconds for up to five numbers, under a second or so for six.
    """
    return _Search(numbers).find((1 << len(numbers)) - 1, target)


def count_solutions(numbers: Sequence[int], target: Fraction) -> int:
    """How many different expressions of all the numbers (each once, + - * /) are worth exactly the target.

    Two expressions are the same solution where, with an unknown in place of each number, they are the same rational
    function, perhaps after equal numbers have changed places. So a+b is b+a, a-(b-c) is c+(a-b), a/(b/c) is a*c/b and
    (a-b)*(c-d) is (b-a)*(d-c); but 2+2 and 2*2 are two, and so are 3*1 and 3/1. An expression that divides by zero is
    none. Up to six numbers, all different, make 1, 6, 68, 1170, 27142 and 793002 functions.

    Two or three milliseconds for four numbers, twenty for five, half a second for six.
    """
    return len(_Functions().worth(tuple(sorted(numbers)), target))


class _Search:
    """Sets of numbers are bit masks; one expression is kept for each value."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self._listed: dict[int, dict[Fraction, Expression]] = {
            1 << bit: {Fraction(number): number} for bit, number in enumerate(numbers)
        }

    def find(self, mask: int, target: Fraction) -> Expression | None:
        if mask.bit_count() <= _LISTED:
            return self._values(mask).get(target)
        for small, large in _halves(mask):
            for value, expression in self._values(small).items():
                # Where 0 times the rest makes 0, so does each number of the rest times what is then left.
                for symbol, missing, comes_first in _missing(value, target):
                    other = self.find(large, missing)
                    if other is not None:
                        pair = (other, expression) if comes_first else (expression, other)
                        return Binary(symbol, *pair)
        return None

    def _values(self, mask: int) -> dict[Fraction, Expression]:
        if mask not in self._listed:
            values: dict[Fraction, Expression] = {}
            for one, other in _halves(mask):
                for a, first in self._values(one).items():
                    for b, second in self._values(other).items():
                        for symbol, value, swapped in _made(a, b):
                            pair = (second, first) if swapped else (first, second)
                            values.setdefault(value, Binary(symbol, *pair))
            self._listed[mask] = values
        return self._listed[mask]


_Function = tuple[int, tuple[str, Any]]
"""A rational function with each unknown written once, as (sign, body). A body is one of

    ("", number)
    ("+", terms)    (sign, body) of two or more terms, none a sum
    ("*", factors)  (exponent, body) of two or more factors, none a product, each exponent 1 or -1

Terms and factors are sorted, and of a sum and its negative, the greater tuple is the body; so two functions are the
same exactly where their tuples are equal. A sign of 0 says that equal numbers which change places turn the function
into its negative, as in 2-2: it has no other sign, nor has a product of it.
"""
_Parts = tuple[_Function, ...]
_Numbers = tuple[int, ...]


class _Functions:
    """The functions of numbers by what they are worth. Numbers are sorted tuples: of equal ones it is all the same
    which of them is in a set."""

    def __init__(self) -> None:
        self._listed: dict[_Numbers, dict[Fraction, set[_Function]]] = {}
        self._found: dict[tuple[_Numbers, Fraction], set[_Function]] = {}

    def worth(self, numbers: _Numbers, target: Fraction) -> set[_Function]:
        """Those worth the target."""
        if len(numbers) <= _LISTED:
            return self._values(numbers).get(target, set())
        if (numbers, target) not in self._found:
            self._found[numbers, target] = self._search(numbers, target)
        return self._found[numbers, target]

    def _search(self, numbers: _Numbers, target: Fraction) -> set[_Function]:
        found: set[_Function] = set()
        for small, large in _partings(numbers):
            for value, functions in self._values(small).items():
                for symbol, missing, swapped in _missing(value, target):
                    _add_all(found, symbol, functions, self.worth(large, missing), swapped)
                if value == target == 0:
                    for other, others in self._values(large).items():
                        for symbol in "*/" if other != 0 else "*":
                            _add_all(found, symbol, functions, others, swapped=False)
        return found

    def _values(self, numbers: _Numbers) -> dict[Fraction, set[_Function]]:
        if numbers not in self._listed:
            values: dict[Fraction, set[_Function]] = {}
            if len(numbers) == 1:
                values[Fraction(numbers[0])] = {(1, ("", numbers[0]))}
            for small, large in _partings(numbers):
                for a, functions in self._values(small).items():
                    for b, others in self._values(large).items():
                        for symbol, value, swapped in _made(a, b):
                            _add_all(values.setdefault(value, set()), symbol, functions, others, swapped)
            self._listed[numbers] = values
        return self._listed[numbers]


def _add_all(
    found: set[_Function], symbol: str, functions: set[_Function], others: set[_Function], swapped: bool
) -> None:
    combine = _sum if symbol in "+-" else _product
    inverse = symbol in "-/"
    for one in functions:
        for other in others:
            found.add(combine(other, one, inverse) if swapped else combine(one, other, inverse))


def _sum(one: _Function, other: _Function, inverse: bool) -> _Function:
    terms = tuple(sorted(_terms(one, 1) + _terms(other, -1 if inverse else 1)))
    negative = tuple(sorted((-sign, body) for sign, body in terms))
    return (terms > negative) - (terms < negative), ("+", max(terms, negative))


def _terms(function: _Function, factor: int) -> _Parts:
    sign, (symbol, parts) = function
    if symbol != "+":
        return ((factor * sign, function[1]),)
    # A sum whose sign is 0 is as good as its negative, and either way the same terms.
    return parts if factor * sign >= 0 else tuple((-each, body) for each, body in parts)


def _product(one: _Function, other: _Function, inverse: bool) -> _Function:
    factors = _factors(one, 1) + _factors(other, -1 if inverse else 1)
    return one[0] * other[0], ("*", tuple(sorted(factors)))


def _factors(function: _Function, power: int) -> _Parts:
    _, (symbol, parts) = function
    return tuple((power * each, body) for each, body in parts) if symbol == "*" else ((power, function[1]),)


@lru_cache(1024)
def _partings(numbers: _Numbers) -> list[tuple[_Numbers, _Numbers]]:
    """Each way to part sorted numbers in two, once, the part with fewer numbers first."""
    partings = {
        tuple(sorted((_taken(numbers, small), _taken(numbers, large)), key=lambda part: (len(part), part)))
        for small, large in _halves((1 << len(numbers)) - 1)
    }
    return [(small, large) for small, large in sorted(partings)]


def _taken(numbers: _Numbers, mask: int) -> _Numbers:
    return tuple(number for bit, number in enumerate(numbers) if mask >> bit & 1)


def _made(a: Fraction, b: Fraction) -> Iterator[tuple[str, Fraction, bool]]:
    """Each (operator, value, whether b comes first) of two values."""
    for symbol, operation in OPERATIONS.items():
        if symbol != "/" or b != 0:
            yield symbol, operation(a, b), False
        if symbol == "-" or (symbol == "/" and a != 0):
            yield symbol, operation(b, a), True


def _missing(value: Fraction, target: Fraction) -> Iterator[tuple[str, Fraction, bool]]:
    """Each (operator, operand, whether the operand comes first) that makes the target of the value; where both are 0,
    so does any operand, and there is no case for it."""
    yield "+", target - value, False
    yield "-", value - target, False
    yield "-", target + value, True
    if value != 0:
        yield "*", target / value, False
        yield "/", target * value, True
        if target != 0:
            yield "/", value / target, False


def _halves(mask: int) -> Iterator[tuple[int, int]]:
    """Each way to part a set in two, once, the part with fewer numbers first."""
    part = (mask - 1) & mask
    while part:
        rest = mask ^ part
        if (part.bit_count(), part) < (rest.bit_count(), rest):
            yield part, rest
        part = (part - 1) & mask
