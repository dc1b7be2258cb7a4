"""Final answers to maths problems: taken out of a completion, and compared with a reference.

The two are stages of their own. `extract` is plain text work in linear time. `same` compares as text first, then as
numbers, and only then by algebra: the library math-verify reads LaTeX into sympy. What sympy is handed is bounded
beforehand (see `READABLE`), because a few characters can ask for more than any machine has: 9^{9^{9}}.
"""

from __future__ import annotations

import logging
import re
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal

Form = Literal["boxed", "answer", "hash", "last_number"]
Reading = Literal["words", "based", "number", "algebra", "text"]

MAX_LENGTH = 200
"""Characters of an answer that sympy is handed; the longest reference of MATH-500 has 53."""
MAX_DEPTH = 6
"""Brackets within one another: the LaTeX parser's time grows exponentially with them, a second at six."""
MAX_MARKS = 12
"""Occurrences of each of ^ _ | in an answer, which the parser can take in many ways."""
MAX_BITS = 1 << 15
"""Size of a number in an answer, such as 9^{9999}."""
READABLE = (
    f"at most {MAX_LENGTH} characters, {MAX_DEPTH} brackets deep, {MAX_MARKS} of each of ^ _ |, "
    f"no number of more than {MAX_BITS} bits, no sum, product, integral or limit left to work out"
)
"""What an answer must be for its value to be looked at; any other is right only where its text is the reference's."""

FAR = 1e-5  # relative; math-verify takes two numbers for equal if six decimals are, so all tiny ones
_CLOSE = Fraction(1, 1_000_000)

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_NUMBER = re.compile(r"(?<![\w.])[-−]?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)")

_LEFT_OUT = re.compile(
    r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\[!,;:()\[\]$%]|[$%\0]|\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree"
)
_SAME_TEXT = {
    "−": "-",
    "{,}": ",",
    "~": " ",
    "\\ ": " ",
    "\\dfrac": "\\frac",
    "\\tfrac": "\\frac",
    "\\dbinom": "\\binom",
}
_THOUSANDS = re.compile(r"[-+]?[0-9]{1,3}(?:(?:,[0-9]{3})+|(?: [0-9]{3})+)(?:\.[0-9]+)?")
_SPACE = re.compile(r"(?<![0-9]) | (?![0-9])")
_TEXT = re.compile(r"\\(?:text|textbf|textit|mbox|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}")
_PROSE = re.compile(r"\\(?:text|textbf|textit|mbox)\s*\{[^{}]*[a-zA-Z]|(?<![\\a-zA-Z])[a-zA-Z]{3,}")
_BASED = re.compile(r"[0-9][0-9A-Za-z]*_(?:[0-9]+|\{[0-9]+\})")
_NO_BRACES = str.maketrans("", "", "{}")
_SCIENTIFIC = re.compile(r"(?<=[0-9.])[eE]([-+]?[0-9]{1,3})(?![\w.])")

_POWER_OF_TEN = re.compile(r"(?<=[0-9.])(?:\\times|\\cdot|\*)10\^(?:\{([-+]?[0-9]{1,3})\}|([0-9]))$")
_FRACTION = re.compile(
    r"([-+]?)(?:([0-9]+)(?: |(?=\\)))?"  # a mixed number is one with a whole number before it
    r"(?:([0-9]+)/([0-9]+)|\\frac(?:\{([0-9]+)\}|([0-9]))(?:\{([0-9]+)\}|([0-9])))"
)
_DECIMAL = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3})?")

_DOUBLED = re.compile(r"([\^_])\s*\w\s*\1")  # x^x^x is not TeX, and takes the parser seconds
_LABOUR = re.compile(r"\^\s*\{?\s*-?[0-9]{5}|\\binom\s*\{[^{}]*[0-9]{5}|\\[gl]c[dm]")  # partly done while it is read


def extract(completion: str, form: Form) -> str | None:
    """The final answer in a completion, without the space around it; None where there is none in this form.

    boxed: what the last \\boxed{...} (or \\fbox) whose braces balance holds; of two nested ones, the inner.
    answer: what the last <answer>...</answer> holds.
    hash: the rest of the line after the last ####.
    last_number: the last decimal number, such as -1,234.5; it stands alone: not `x2`, and `10-3` ends in 3.

    The time is linear in the completion's length, whatever it holds.
    """
    match form:
        case "boxed":
            found = _last_boxed(completion)
        case "answer":
            found = _last_tagged(completion)
        case "hash":
            found = completion.rpartition("####")[2].partition("\n")[0] if "####" in completion else ""
        case "last_number":
            found = ""
            for match in _NUMBER.finditer(completion):
                found = match.group()
    return found.strip() or None


def _last_boxed(text: str) -> str:
    opened: list[tuple[int, bool]] = []  # where what is in the braces starts, and whether it is boxed
    last: tuple[int, int] | None = None
    for token in _BRACES.finditer(text):
        if token.group() == "}":
            start, boxed = opened.pop() if opened else (0, False)
            if boxed and (last is None or start > last[0]):
                last = start, token.start()
        elif token.group().endswith("{") and token.group() != "\\{":
            opened.append((token.end(), token.group() != "{"))
    return "" if last is None else text[slice(*last)]


def _last_tagged(text: str) -> str:
    start = text.rfind("<answer>", 0, max(text.rfind("</answer>"), 0))
    return "" if start < 0 else text[start + len("<answer>") : text.find("</answer>", start)]


def same(answer: str, reference: str) -> bool:
    """Whether an answer is the reference: the same text or, by what the reference is (see `reading`), the same thing.

    In text, spacing, \\left, \\text{}, $, %, degrees, separators of thousands and a closing full stop do not count.
    Never raises for what an answer says, but may take longer than anyone would wait: call it where it can be ended.
    """
    answer, reference = _tidied(answer), _tidied(reference)
    given, wanted = _bare(answer), _bare(reference)
    if given == wanted:
        return True
    kind = reading(reference)
    if kind == "words":
        return given.casefold() == wanted.casefold()
    if kind == "based":
        return given.translate(_NO_BRACES) in (wanted.translate(_NO_BRACES), wanted.partition("_")[0])
    value, right = number(answer), number(reference)
    if value is not None and right is not None:
        return abs(value - right) <= (0 if right.denominator == 1 else abs(right) * _CLOSE)
    return kind != "text" and equal_by_algebra(answer, reference)


def reading(reference: str) -> Reading:
    """What a reference is, and so what an answer with another text must be.

    words: `\\text{even}`, `Evelyn`. The answer must be the same but for capitals.
    based: 52_8, a number in a base. The base may be left out.
    number: see `number`. Where the reference is whole the answer must be exact, else within one part in a million.
    algebra: other LaTeX that is `READABLE`. The answer must be equal by algebra (see `equal_by_algebra`).
    text: what is left. No other text will do.
    """
    reference = _tidied(reference)
    if _is_words(reference):
        return "words"
    if _BASED.fullmatch(_bare(reference)):
        return "based"
    if number(reference) is not None:
        return "number"
    return "text" if _parsed_reference(reference) is None else "algebra"


def number(text: str) -> Fraction | None:
    """The value of a decimal number or a fraction, None for other text.

    Such are -1,234.5, 4.5e33, 4.5 \\times 10^{33}, 3/4, 1 3/4 and 1\\frac{3}{4}.
    """
    plain = _bare(_tidied(text))
    if len(plain) > MAX_LENGTH:
        return None
    plain = _POWER_OF_TEN.sub(lambda match: f"e{match[1] or match[2]}", plain)
    if _DECIMAL.fullmatch(plain):
        return Fraction(plain)
    fraction = _FRACTION.fullmatch(plain)
    if fraction is None:
        return None
    sign, whole, *parts = fraction.groups()
    above, below = (int(part) for part in parts if part)
    return int(f"{sign}1") * (int(whole or 0) + Fraction(above, below)) if below else None


def equal_by_algebra(answer: str, reference: str) -> bool:
    """Whether math-verify finds two LaTeX texts equal; False where either cannot be read or is not `READABLE`.

    math-verify's own time-outs are off. They are alarm signals, which Python attends to between two of its own steps
    only, so a power of large numbers, one step, is not ended by them; and where they do end something, it is scored
    wrong instead of having no score. Whoever calls this ends the process instead (workers.scoring does).
    """
    from math_verify import verify

    wanted, given = _parsed_reference(_tidied(reference)), parsed(_tidied(answer))
    if wanted is None or given is None or _are_far_apart(wanted, given):
        return False
    return bool(verify(wanted, given, timeout_seconds=None))


def parsed(text: str) -> Any:
    """LaTeX as a sympy object, None where it cannot be read or is not `READABLE`."""
    from math_verify import LatexExtractionConfig, parse
    from sympy import Integral, Limit, Product, Sum

    if not _is_tame(text):
        return None
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time-outs are off
    config = LatexExtractionConfig(boxed_match_priority=-1)
    found = parse(f"${text}$", [config], fallback_mode="no_fallback", parsing_timeout=None)
    if not found or _bits(found[0]) > MAX_BITS or found[0].has(Sum, Product, Integral, Limit):
        return None
    return found[0]


_parsed_reference = lru_cache(maxsize=256)(parsed)  # every rollout of a problem asks for the same


def _tidied(text: str) -> str:
    """The text without what does not count in LaTeX; still LaTeX."""
    if "\\boxed" in text or "\\fbox" in text:
        text = extract(text, "boxed") or text
    for written, meant in _SAME_TEXT.items():
        text = text.replace(written, meant)
    text = _SCIENTIFIC.sub(r" \\times 10^{\1}", text)
    text = " ".join(_LEFT_OUT.sub("", text).split()).removesuffix(".").strip()
    return re.sub("[, ]", "", text) if _THOUSANDS.fullmatch(text) else text


def _bare(text: str) -> str:
    """The text of tidied LaTeX without \\text{} and spaces, save between two digits, to compare."""
    return _SPACE.sub("", " ".join(_TEXT.sub(r"\1", text).split()))


def _is_words(text: str) -> bool:
    """Whether an answer says something in words: read as algebra, `even` would be e*e*n*v, and `neve` the same."""
    return not re.search("[0-9]", text) and bool(_PROSE.search(text))


def _is_tame(text: str) -> bool:
    """Whether LaTeX can be read in reasonable time (see `READABLE`)."""
    return (
        len(text) <= MAX_LENGTH
        and _depth(text) <= MAX_DEPTH
        and max(map(text.count, "^_|")) <= MAX_MARKS
        and not _DOUBLED.search(text)
        and not _LABOUR.search(text)
    )


def _depth(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest


def _bits(expression: Any) -> float:
    """A bound on the bits of the largest number that working out an expression, still as it was written, makes."""
    from sympy.functions.combinatorial.factorials import CombinatorialFunction

    if getattr(expression, "is_Rational", False):
        return float(max(int(expression.p).bit_length(), int(expression.q).bit_length()))
    if getattr(expression, "is_Float", False):
        return float(int(abs(expression)).bit_length())
    inner = [_bits(part) for part in (expression.flat() if hasattr(expression, "flat") else expression.args)]
    if getattr(expression, "is_Pow", False):
        return max(inner[0], 1.0) * 2.0 ** min(inner[1], 64)
    if isinstance(expression, CombinatorialFunction):
        return inner[0] * 2.0 ** min(inner[0], 64)
    return sum(inner, 1.0)


def _are_far_apart(one: Any, other: Any) -> bool:
    """Whether both are numbers, and certainly different ones."""
    if not (getattr(one, "is_number", False) and getattr(other, "is_number", False)):
        return False
    difference, size = (abs((value).evalf(30)) for value in (one - other, one))
    return bool(difference.is_finite and size.is_finite and difference > FAR * size)
