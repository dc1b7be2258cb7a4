"""Countdown: write an expression of the given numbers, each exactly once, that equals the target.

Prompt forms and verdicts follow the Countdown of "Evolution Strategies at Scale" (arXiv:2509.24372): its published
rule is the `r1` form here, and its published data is read by the `dataset` template. One difference: the published
check lets `**` and `//` through by oversight; here they make an answer invalid.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, get_args

from rewards import prompts
from rewards.base import Example, Rollout, Score, Split, Verifier, register
from rewards.countdown_problems import Settings, filed, generated
from rewards.countdown_solver import solve
from rewards.expressions import Expression, ExpressionError, evaluate, literals, parse, to_text
from rewards.problems import Problems, Row, staged
from rewards.r1 import format_grade, last_answer
from rewards.weights import checked_weights, weighted_verifier

Template = Literal["plain", "few_shot", "chat", "r1", "dataset"]
Form = Literal["plain", "r1"]

WEIGHTS = {"format": 0.1, "numbers": 0.2, "solved": 0.7}
_TOLERANCE = Fraction(1, 100_000)
_MAX_TOKENS: dict[Template, int] = {"plain": 24, "few_shot": 14, "chat": 32, "r1": 1024, "dataset": 1024}
_TYPED_OPERATORS = str.maketrans("×÷−", "*/-")
_CLAIM = re.compile(r"-?[0-9]{1,20}(\.[0-9]{1,20})?")


class Countdown:
    """The Countdown task: problems from a seeded generator, or from files where `data` is given.

    Args:
        numbers: how many numbers a problem has, one of these at random; each 2 to 6.
        low, high: the least and the greatest number.
        operations: those that the generator's solutions use, of `+-*/`; an answer may always use all four.
        targets: the least and the greatest target; the generator's targets are whole and positive.
        solutions: the least and the most solutions of a generated problem (see `count_solutions`): the fewer, the
            harder. Each problem that is tried has them counted, which takes half a second where it has six numbers.
        curriculum: stages that the first training problems go through, each a mapping with its number of `problems` and
            those of the settings above in which it differs from the task.
        template: `plain` (for a character tokenizer), `few_shot`, `chat`, `r1` (<think>, <answer>), or `dataset`
            (a row's own prompt under `context`, answered in the `r1` form).
        shots: worked lines in a `few_shot` prompt.
        seed: of the problems' choice and order. It does not move a problem from one split to the other.
        max_tokens, stop: for generation; left out, what suits the template.
        data, heldout_data: files of rows (see `read_rows`); without the second, rows of the first are held out.
        verifier: a user's own (see `VerifierSpec`) in place of `countdown`.
        weights: of the reward's components (see `countdown_verifier`).

    Raises ValueError, naming the field, for values that give no problems or contradict each other.
    """

    def __init__(
        self,
        *,
        numbers: tuple[int, ...] = (3,),
        low: int = 1,
        high: int = 20,
        operations: str = "+-*/",
        targets: tuple[int, int] = (1, 100),
        solutions: tuple[int, int] | None = None,
        curriculum: Sequence[Mapping[str, Any]] = (),
        template: Template = "few_shot",
        shots: int = 2,
        seed: int = 0,
        max_tokens: int | None = None,
        stop: Sequence[str] | None = None,
        data: str | Path | None = None,
        heldout_data: str | Path | None = None,
        verifier: str | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        settings = Settings(numbers, low, high, operations, targets, solutions)
        _check_template(template, shots, data, heldout_data)
        _check_data(data, heldout_data, solutions, curriculum)
        form: Form = "r1" if template in ("r1", "dataset") else "plain"
        self.max_tokens = _MAX_TOKENS[template] if max_tokens is None else max_tokens
        self.stop = (("\n",) if form == "plain" else ()) if stop is None else tuple(stop)
        self.verifier = weighted_verifier("countdown", verifier, weights, WEIGHTS, {"form": form})
        self._template, self._shots = template, shots
        self._problems: Problems
        if data is None:
            self._problems = staged(
                curriculum,
                list(asdict(settings)),
                lambda stage, field: generated(replace(settings, **stage), seed, field),
            )
        else:
            heldout_path = None if heldout_data is None else Path(heldout_data)
            self._problems = filed(Path(data), heldout_path, template == "dataset", seed)
        self.rows: int | None = None
        for split in get_args(Split):
            self.example(split, 0)  # settings that allow no problem are refused here, not in the middle of a run

    def example(self, split: Split, index: int) -> Example:
        """Problem number `index` (from 0) of a split; a pure function of its arguments.

        The answer is the target, and `info` the row: `numbers`, `target` and what else the source gave.
        """
        row = self._problems.row(split, index)
        numbers, target = row["numbers"], row["target"]
        identity = f"{','.join(map(str, numbers))}={target}"
        if self._template == "chat":
            messages = ({"role": "user", "content": prompts.chat(numbers, target)},)
            return Example(identity, target, row, messages=messages)
        return Example(identity, target, row, prompt=self._prompt(row))

    def worked_solution(self, example: Example) -> str:
        """A completion that solves the example, in the template's form and without the closing newline.

        The expression is the row's own `solution` where that is right, else the solver's. Raises ValueError where the
        problem has no solution.
        """
        expression = to_text(_solution(example.info))
        match self._template:
            case "plain" | "chat":
                return expression
            case "few_shot":
                return f" {expression}"
            case "r1" | "dataset":
                return f" {expression} = {example.answer} </think>\n<answer>{expression}</answer>"

    def _prompt(self, row: Row) -> str:
        numbers, target = row["numbers"], row["target"]
        match self._template:
            case "plain":
                return prompts.plain(numbers, target)
            case "few_shot":
                return prompts.few_shot(numbers, target, self._shots)
            case "r1":
                return prompts.r1(numbers, target)
            case _:
                return str(row["context"])


@register("countdown")
def countdown_verifier(form: Form = "plain", weights: Mapping[str, float] | None = None) -> Verifier:
    """The verifier of a form. A rollout's `info` has `numbers` and `target`; a completion cut off is read as it stands.

    plain: the first line is an expression. `×`, `÷` and `−` are read as operators. `= N` may follow; where N is not the
    target, the line is not solved whatever its expression.
    r1: the last <answer>...</answer> holds an expression. The prompt has already opened the <think>.

    The answer is solved if its numbers are the given ones, each exactly once, and its value is within 1e-5 of the
    target; that is `accuracy`, 0 or 1. The reward is the sum of three components, each its weight times:

    format: plain: 1 if the line is an expression with a value. r1: 1 if the whole is "<think>...</think>\\n<answer>...
        </answer>", else 0.1 for a <think>...</think> and 0.5 for an <answer>...</answer>.
    numbers: the share of right numbers: those of the answer found among the given ones, over the longer list's length.
    solved: 1 if solved.

    The weights default to `WEIGHTS`; `{"format": 0.1, "numbers": 0, "solved": 1}` makes r1 the published reward.
    """
    if form not in get_args(Form):
        raise ValueError(f"verifier: form is {form!r}; accepted are {', '.join(get_args(Form))}")
    scale = checked_weights(weights, WEIGHTS)
    judge = _judge_r1 if form == "r1" else _judge_plain

    def verify(rollout: Rollout) -> Score:
        grades = judge(rollout.completion, rollout.info)
        components = {name: scale[name] * grade for name, grade in grades.items()}
        return Score(sum(components.values()), components, accuracy=grades["solved"])

    return verify


def _judge_plain(completion: str, info: Mapping[str, Any]) -> dict[str, float]:
    line = completion.partition("\n")[0].translate(_TYPED_OPERATORS).strip()
    answer, equals, claim = line.partition("=")
    claim = claim.strip()
    if equals and not _CLAIM.fullmatch(claim):
        return {"format": 0.0, "numbers": 0.0, "solved": 0.0}
    valid, right_numbers, solved = _judge_expression(answer.strip(), info)
    honest = not equals or _reaches(Fraction(claim), info)
    return {"format": float(valid), "numbers": right_numbers, "solved": float(solved and honest)}


def _judge_r1(completion: str, info: Mapping[str, Any]) -> dict[str, float]:
    text = f"<think>{completion}"
    answer = last_answer(text)
    _, right_numbers, solved = (False, 0.0, False) if answer is None else _judge_expression(answer.strip(), info)
    return {"format": format_grade(text), "numbers": right_numbers, "solved": float(solved)}


def _judge_expression(text: str, info: Mapping[str, Any]) -> tuple[bool, float, bool]:
    """Whether it is an expression with a value, its share of right numbers, and whether it is a solution."""
    try:
        expression = parse(text)
        value = evaluate(expression)
    except ExpressionError:
        return False, 0.0, False
    used, given = Counter(literals(expression)), Counter(info["numbers"])
    right = (used & given).total() / max(used.total(), given.total())
    return True, right, used == given and _reaches(value, info)


def _reaches(value: Fraction, info: Mapping[str, Any]) -> bool:
    return abs(value - Fraction(info["target"])) < _TOLERANCE


def _solution(info: Mapping[str, Any]) -> Expression:
    numbers, target = info["numbers"], info["target"]
    written = info.get("solution")
    if isinstance(written, str) and _judge_expression(written, info)[2]:
        return parse(written)
    found = solve(numbers, Fraction(target))
    if found is None:
        raise ValueError(f"task: no expression of the numbers {numbers} equals {target}")
    return found


def _check_template(template: str, shots: int, data: object, heldout_data: object) -> None:
    if template not in get_args(Template):
        raise ValueError(f"task.template: {template!r} is not one of {', '.join(get_args(Template))}")
    if not 0 <= shots <= len(prompts.WORKED):
        raise ValueError(f"task.shots: {shots} is not from 0 to {len(prompts.WORKED)}")
    if template == "dataset" and data is None:
        raise ValueError("task.template: dataset takes its prompts from the rows of task.data, which is not given")


def _check_data(data: object, heldout_data: object, solutions: object, curriculum: Sequence[Mapping[str, Any]]) -> None:
    if heldout_data is not None and data is None:
        raise ValueError("task.heldout_data: it goes with task.data, which is not given")
    for field, given in (("solutions", solutions), ("curriculum", curriculum)):
        if given and data is not None:
            raise ValueError(f"task.{field}: it is for generated problems; leave it out, or else task.data")
