"""Conciseness: answer a question, and say no more than the shortest right answer does.

The reward is that of "Evolution Strategies at Scale" (arXiv:2509.24372): minus the difference between the lengths, in
characters, of the completion and of the shortest right answer. It looks at length alone, so that it measures how well
a method shifts behaviour; `accuracy` says beside it whether the answer is right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from rewards.base import Example, Rollout, Score, Split, Verifier, register
from rewards.concise_questions import QUESTIONS
from rewards.problems import FiledProblems, Row, digest, read_records
from rewards.weights import checked_weights, weighted_verifier

Template = Literal["chat", "plain"]

WEIGHTS = {"length": 1.0, "correct": 0.0}


class Conciseness:
    """The conciseness task: questions from a file, or those that come with the project.

    Args:
        data: a file of rows (see `read_rows`); without it, the 32 questions of `rewards.concise_questions`.
        heldout_data: another; without it, rows of the first are held out.
        template: `chat` (the question alone) or `plain` (for a model without roles).
        scale: characters at which the length's grade is down to 0; left out, the published reward (see
            `conciseness_verifier`).
        seed: of the problems' order. It does not move a problem from one split to the other.
        max_tokens, stop: for generation; left out, 100 tokens and, for `plain`, the end of the line.
        verifier: a user's own (see `VerifierSpec`) in place of `conciseness`.
        weights: of the reward's components.

    Raises ValueError, naming the field, for values that give no problems or contradict each other.
    """

    def __init__(
        self,
        *,
        data: str | Path | None = None,
        heldout_data: str | Path | None = None,
        template: Template = "chat",
        scale: float | None = None,
        seed: int = 0,
        max_tokens: int | None = None,
        stop: Sequence[str] | None = None,
        verifier: str | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        if template not in get_args(Template):
            raise ValueError(f"task.template: {template!r} is not one of {', '.join(get_args(Template))}")
        if heldout_data is not None and data is None:
            raise ValueError("task.heldout_data: it goes with task.data, which is not given")
        self.max_tokens = 100 if max_tokens is None else max_tokens
        self.stop = (("\n",) if template == "plain" else ()) if stop is None else tuple(stop)
        self.verifier = weighted_verifier("conciseness", verifier, weights, WEIGHTS, {"scale": _checked_scale(scale)})
        self._template = template
        rows = _built_in() if data is None else read_rows(Path(data), "task.data")
        heldout = None if heldout_data is None else read_rows(Path(heldout_data), "task.heldout_data")
        self._problems = FiledProblems(
            rows, heldout, problem_key, seed, "the built-in set" if data is None else str(data)
        )
        self.rows: int | None = self._problems.training_rows

    def example(self, split: Split, index: int) -> Example:
        """Problem number `index` (from 0) of a split; a pure function of its arguments.

        The answer is the shortest right one, and `info` the row: `question`, `answers` and what else the source gave.
        """
        row = self._problems.row(split, index)
        name, shortest = digest(problem_key(row)).hex()[:12], min(row["answers"], key=len)
        if self._template == "chat":
            return Example(name, shortest, row, messages=({"role": "user", "content": row["question"]},))
        return Example(name, shortest, row, prompt=f"Question: {row['question']}\nAnswer:")

    def worked_solution(self, example: Example) -> str:
        """The shortest right answer, and nothing else."""
        return example.answer


@register("conciseness")
def conciseness_verifier(scale: float | None = None, weights: Mapping[str, float] | None = None) -> Verifier:
    """The verifier of conciseness. A rollout's `info` has `answers`, the right ones.

    `accuracy` is 1 where the completion, without the space around it, is one of the right answers to the letter, else
    0. The reward is the sum of two components, each its weight times:

    length: minus the difference, in characters, between the lengths of the completion, as it stands, and of the
        shortest right answer; where there is a `scale`, 1 less the difference over the scale, and at least 0.
    correct: 1 if it is right.

    No scale and the default weights, length 1 and correct 0, are the published reward; it is 0 at best. With a scale
    and weights that sum to 1, rewards are from 0 to 1, as those of other tasks.
    """
    scale, weight = _checked_scale(scale), checked_weights(weights, WEIGHTS)

    def verify(rollout: Rollout) -> Score:
        answers = rollout.info["answers"]
        difference = abs(len(rollout.completion) - min(map(len, answers)))
        length = -float(difference) if scale is None else max(0.0, 1 - difference / scale)
        right = float(rollout.completion.strip() in answers)
        components = {"length": weight["length"] * length, "correct": weight["correct"] * right}
        return Score(sum(components.values()), components, accuracy=right)

    return verify


def read_rows(path: Path, field: str) -> list[Row]:
    """The rows of a file of JSON lines or of one JSON list, with `question` and `answers`.

    Right answers are a list under `answers`, or one text under `answer`. Raises ValueError naming `field`, file and
    row.
    """
    return [_checked(record, place) for place, record in read_records(path, field)]


def problem_key(row: Row) -> str:
    """The question, whatever its spacing."""
    return " ".join(row["question"].split())


def _built_in() -> list[Row]:
    return [{"question": question, "answers": list(answers)} for question, answers in QUESTIONS]


def _checked(record: Any, place: str) -> Row:
    if not isinstance(record, dict):
        raise ValueError(f"{place} is not an object with `question` and `answers`")
    question = record.get("question")
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"{place}: `question` is {question!r:.60}; accepted is the question as text")
    answers = record["answers"] if "answers" in record else [record.get("answer")]
    if (
        not isinstance(answers, list)
        or not answers
        or not all(isinstance(text, str) and text.strip() for text in answers)
    ):
        raise ValueError(
            f"{place}: the right answers are {answers!r:.60}; accepted is a text under `answer` or a list of texts "
            "under `answers`"
        )
    return {**record, "answers": [text.strip() for text in answers]}


def _checked_scale(scale: float | None) -> float | None:
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"task.scale: {scale!r} is not a number above 0")
    return scale
