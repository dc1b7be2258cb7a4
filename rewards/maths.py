"""Maths problems with a final answer that can be checked: GSM8K, MATH-500, AIME, AMC, OlympiadBench, Minerva, others.

Three stages, each a function of its own: a template asks for the answer in a form, `extract` takes it out of the
completion, `same` compares it with the reference (both in rewards.answers).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from rewards import math_prompts
from rewards.answers import Form, extract, parsed, same
from rewards.base import Example, Rollout, Score, Split, Verifier, register
from rewards.math_data import Dataset, filed, identity
from rewards.weights import checked_weights, weighted_verifier

Template = Literal["chat", "r1", "plain", "few_shot"]

WEIGHTS = {"format": 0.1, "correct": 0.9}
FORMS: dict[Template, tuple[Form, ...]] = {
    "chat": ("boxed",),
    "r1": ("answer",),
    "plain": ("boxed",),
    "few_shot": ("hash",),
}
"""Where each template has the answer, and so where it is looked for if nothing else is said."""
_MAX_TOKENS: dict[Template, int] = {"chat": 1024, "r1": 1024, "plain": 1024, "few_shot": 320}


class Maths:
    """The math task: problems from files or a hub, answered in words and symbols.

    Args:
        data: a file of rows or `hub:owner/name` (see `rewards.math_data.read_rows`).
        heldout_data: another; without it, rows of the first are held out.
        dataset: how a row's question and reference answer are read.
        fields: the columns of `question` and `answer`, where they are not the data set's own.
        template: `chat`, `r1` (<think>, <answer>), `plain` (for a model without roles) or `few_shot`.
        shots: worked problems in a `few_shot` prompt.
        forms: how an answer is found in a completion: the first of these that is there counts. Left out, what suits
            the template.
        seed: of the problems' order. It does not move a problem from one split to the other.
        max_tokens, stop: for generation; left out, what suits the template.
        verifier: a user's own (see `VerifierSpec`) in place of `math`.
        weights: of the reward's components (see `math_verifier`).

    Raises ValueError, naming the field, for values that give no problems or contradict each other.
    """

    def __init__(
        self,
        *,
        data: str,
        heldout_data: str | None = None,
        dataset: Dataset = "custom",
        fields: Mapping[str, str | None] | None = None,
        template: Template = "chat",
        shots: int = 2,
        forms: Sequence[Form] | None = None,
        seed: int = 0,
        max_tokens: int | None = None,
        stop: Sequence[str] | None = None,
        verifier: str | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        _check(dataset, template, shots, fields)
        self.max_tokens = _MAX_TOKENS[template] if max_tokens is None else max_tokens
        self.stop = (("\nProblem:",) if template == "few_shot" else ()) if stop is None else tuple(stop)
        options = {"forms": _checked_forms(FORMS[template] if forms is None else forms)}
        self.verifier = weighted_verifier("math", verifier, weights, WEIGHTS, options)
        self._template, self._shots = template, shots
        self._problems = filed(data, heldout_data, dataset, fields or {}, seed)
        self.rows: int | None = self._problems.training_rows

    def example(self, split: Split, index: int) -> Example:
        """Problem number `index` (from 0) of a split; a pure function of its arguments.

        The answer is the reference, and `info` the row as it was found.
        """
        row = self._problems.row(split, index)
        name, answer, record = identity(row), row["answer"], row["record"]
        if self._template == "chat":
            system = {"role": "system", "content": math_prompts.SYSTEM}
            messages = (system, {"role": "user", "content": row["question"]})
            return Example(name, answer, record, messages=messages)
        return Example(name, answer, record, prompt=self._prompt(row["question"]))

    def worked_solution(self, example: Example) -> str:
        """A completion that closes with the reference answer, in the template's form."""
        match self._template:
            case "chat" | "plain":
                return f"The final answer is \\boxed{{{example.answer}}}."
            case "few_shot":
                return f" The answer is known.\n#### {example.answer}"
            case "r1":
                return f" The answer is known. </think>\n<answer>{example.answer}</answer>"

    def _prompt(self, question: str) -> str:
        match self._template:
            case "few_shot":
                return math_prompts.few_shot(question, self._shots)
            case "r1":
                return math_prompts.r1(question)
            case _:
                return math_prompts.plain(question)


@register("math")
def math_verifier(forms: Sequence[Form] = ("boxed",), weights: Mapping[str, float] | None = None) -> Verifier:
    """The verifier of maths answers. The answer in a completion is what the first of `forms` that is there holds (see
    `rewards.answers.extract`); it is right if it is the same as the rollout's `answer` (see `rewards.answers.same`).

    `accuracy` is 1 where it is right, else 0. The reward is the sum of two components, each its weight times:

    format: 1 if there is an answer in one of the forms.
    correct: 1 if it is right.

    The weights default to `WEIGHTS`. A comparison may run into the deadline or the memory limit of its process.
    """
    forms, scale = _checked_forms(forms), checked_weights(weights, WEIGHTS)
    parsed("1")  # math-verify takes a second to load, and the clock of the first rollout does not run yet

    def verify(rollout: Rollout) -> Score:
        answer = _answer(rollout.completion, forms)
        right = answer is not None and same(answer, rollout.answer)
        grades = {"format": float(answer is not None), "correct": float(right)}
        components = {name: scale[name] * grade for name, grade in grades.items()}
        return Score(sum(components.values()), components, accuracy=grades["correct"])

    return verify


def _answer(completion: str, forms: Sequence[Form]) -> str | None:
    found = (extract(completion, form) for form in forms)
    return next((answer for answer in found if answer is not None), None)


def _checked_forms(forms: Sequence[Form]) -> list[Form]:
    if not forms or not set(forms) <= set(get_args(Form)):
        raise ValueError(f"task.forms: {list(forms)} must be one or more of {', '.join(get_args(Form))}")
    return list(forms)


def _check(dataset: str, template: str, shots: int, fields: Mapping[str, str | None] | None) -> None:
    if dataset not in get_args(Dataset):
        raise ValueError(f"task.dataset: {dataset!r} is not one of {', '.join(get_args(Dataset))}")
    if template not in get_args(Template):
        raise ValueError(f"task.template: {template!r} is not one of {', '.join(get_args(Template))}")
    if not 0 <= shots <= len(math_prompts.WORKED):
        raise ValueError(f"task.shots: {shots} is not from 0 to {len(math_prompts.WORKED)}")
    if unknown := set(fields or {}) - {"question", "answer"}:
        raise ValueError(f"task.fields: {min(unknown)!r} is not one of question, answer")
