"""Completions from a file, scored as a run would score them; and what a task's problems look like."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from es_engine.config import TaskConfigModel
from es_engine.run_folder import write_json_lines
from rewards.base import Example, Rollout, Score, Task
from rewards.problems import read_records
from workers.chunks import by_verifier
from workers.scoring import open_scorer

SHOWN = 5


@dataclass(frozen=True, slots=True)
class Graded:
    """A problem of a task with what a right completion and a wrong one, another problem's, are worth."""

    example: Example
    right: str
    right_score: Score
    wrong: str
    wrong_score: Score


def score_file(task: TaskConfigModel, source: Path, target: Path) -> dict[str, Any]:
    """Score the completions of a file of JSON lines, and write the same lines with `score`, `accuracy`, `components`
    and `error`, and what `notes` the verifier made; the summary.

    A line has `prompt` (text, or a chat's messages), `completion` and the fields of the data row, such as `answer`; for
    verifiers that look at them, also `token_ids` and `finish_reason`. Lines in a row with equal prompts are a group.
    Raises ValueError, naming file and line, for what is no such line.
    """
    records = read_records(source, "--in")
    rollouts = [_rollout(record, place) for place, record in records]
    with open_scorer(task, task.build().verifier, _processes(len(rollouts))) as scorer:
        for _, group in groupby(range(len(rollouts)), key=lambda number: records[number][1]["prompt"]):
            keys = list(group)
            scorer.submit_group(keys, [rollouts[key] for key in keys])
        scores = scorer.drain()
        failures = by_verifier(scorer.failures)
    rows = [{**record, **_fields(scores[number])} for number, (_, record) in enumerate(records)]
    write_json_lines(target, rows)
    return _summary(rows, failures)


def graded(task: Task, limits: TaskConfigModel) -> Iterator[Graded]:
    """The first problems of a task's training split, each with a right and a wrong completion and their scores."""
    examples = [task.example("train", index) for index in range(SHOWN + 1)]
    completions = [task.worked_solution(example) for example in examples]
    with open_scorer(limits, task.verifier, _processes(SHOWN)) as scorer:
        for number, example in enumerate(examples[:SHOWN]):
            for key, completion in ((number, completions[number]), (number + SHOWN, completions[number + 1])):
                scorer.submit(key, _answered(example, completion))
        scores = scorer.drain()
    for number, example in enumerate(examples[:SHOWN]):
        yield Graded(example, completions[number], scores[number], completions[number + 1], scores[number + SHOWN])


def _processes(rollouts: int) -> int:
    return max(1, min(rollouts, len(os.sched_getaffinity(0))))


def _rollout(record: Any, place: str) -> Rollout:
    if not isinstance(record, Mapping) or not isinstance(record.get("completion"), str):
        raise ValueError(f"{place} is not an object with `prompt` and `completion`")
    prompt = record.get("prompt")
    messages = None
    if isinstance(prompt, list) and all(map(_is_message, prompt)):
        messages = tuple(prompt)
        prompt = "\n".join(message["content"] for message in messages)
    if not isinstance(prompt, str):
        raise ValueError(f"{place}: `prompt` is {prompt!r:.60}; accepted is text or a list of messages")
    answer = record.get("answer")
    return Rollout(
        prompt,
        record["completion"],
        "" if answer is None else str(answer),
        record,
        messages,
        token_ids=tuple(record.get("token_ids", ())),
        finish_reason=record.get("finish_reason", "stop"),
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("content"), str)


def _answered(example: Example, completion: str) -> Rollout:
    return Rollout(example.prompt or "", completion, example.answer, example.info, example.messages)


def _fields(score: Score) -> dict[str, Any]:
    fields = {"score": score.value, "accuracy": score.accuracy, "components": score.components, "error": score.error}
    return fields | ({"notes": score.notes} if score.notes else {})


def _summary(rows: list[dict[str, Any]], failures: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    names = Counter(name for row in rows for name in row["components"])
    return {
        "completions": len(rows),
        "score": _mean([row["score"] for row in rows]),
        "accuracy": _mean([row["accuracy"] for row in rows]),
        "components": {name: _mean([row["components"].get(name) for row in rows]) for name in sorted(names)},
        "failures": failures,
    }


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
