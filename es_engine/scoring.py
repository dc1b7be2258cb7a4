"""Completions from a file, scored as a run would score them; and what a task's problems look like."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from es_engine.config import MultiTurnTaskConfig, SingleTurnTaskConfig, TaskConfigModel
from es_engine.run_folder import refuse_no_file, write_json_lines
from rewards.base import Example, Rollout, Score, SingleTurnTask, VerifierSpec
from rewards.composition import verifier_names
from rewards.environments import Policy, announce, recital
from rewards.problems import read_records
from workers.chunks import Problem, by_verifier
from workers.engine import Completion
from workers.games import Game, new_game, play
from workers.scoring import Scorer, open_scorer

SHOWN = 5


@dataclass(frozen=True, slots=True)
class Graded:
    """A problem of a task with what a right completion and a wrong one, another problem's, are worth; None where the
    task knows none."""

    example: Example
    right: str | None
    right_score: Score | None
    wrong: str | None
    wrong_score: Score | None


def score_file(task: TaskConfigModel, source: Path, target: Path) -> dict[str, Any]:
    """Score the completions of a file of JSON lines, and write the same lines with `score`, `accuracy`, `components`
    and `error`, and what `notes` the verifier made; the summary.

    A line has `prompt` (text, or a chat's messages), `completion` and the fields of the data row, such as `answer`; for
    verifiers that look at them, also `token_ids` and `finish_reason`. Lines in a row with equal prompts are a group.
    Raises ValueError, naming file and line, for what is no such line, for a task of several turns, and where `target`
    can be no file.
    """
    if not isinstance(task, SingleTurnTaskConfig):
        raise ValueError(
            f"task.kind: {task.kind} is a game of several turns, whose completions answer what was said before; they "
            "can only be scored as they are made, by eval or train"
        )
    refuse_no_file(target)
    records = read_records(source, "--in")
    rollouts = [_rollout(record, place, task) for place, record in records]
    verifier = task.build().verifier
    with open_scorer(task, verifier, _processes(verifier, len(rollouts))) as scorer:
        for _, group in groupby(range(len(rollouts)), key=lambda number: records[number][1]["prompt"]):
            keys = list(group)
            scorer.submit_group(keys, [rollouts[key] for key in keys])
        scores = scorer.drain()
        failures = by_verifier(scorer.failures)
    rows = [{**record, **_fields(scores[number])} for number, (_, record) in enumerate(records)]
    write_json_lines(target, rows)
    return _summary(rows, failures)


def graded(config: TaskConfigModel) -> list[Graded]:
    """The first problems of a task's training split, each with a right and a wrong completion and their scores. Of a
    game, a completion is all that followed the first prompt."""
    if isinstance(config, MultiTurnTaskConfig):
        return _graded_games(config)
    assert isinstance(config, SingleTurnTaskConfig)
    return _graded_answers(config)


def _graded_answers(config: SingleTurnTaskConfig) -> list[Graded]:
    task = config.build()
    examples = [task.example("train", index) for index in range(SHOWN + 1)]
    completions = [_worked_solution(task, example) for example in examples]
    with open_scorer(config, task.verifier, _processes(task.verifier, SHOWN)) as scorer:
        for number, example in enumerate(examples[:SHOWN]):
            for key, completion in ((number, completions[number]), (number + SHOWN, completions[number + 1])):
                if completion is not None:
                    scorer.submit(key, _answered(example, completion))
        scores = scorer.drain()
    return [
        Graded(example, completions[number], scores.get(number), completions[number + 1], scores.get(number + SHOWN))
        for number, example in enumerate(examples[:SHOWN])
    ]


def _graded_games(config: MultiTurnTaskConfig) -> list[Graded]:
    """The wrong game of a problem says, whatever it hears, what the right game of the next one said."""
    task = config.build()
    examples = [task.example("train", index) for index in range(SHOWN + 1)]
    with open_scorer(config, task.verifier, _processes(task.verifier, SHOWN)) as scorer:
        right = _played(examples, [task.worked_policy(example) for example in examples], scorer)
        deaf = [recital(example, _said(following)) for example, following in zip(examples, right[1:], strict=False)]
        wrong = _played(examples[:SHOWN], deaf, scorer)
    outcomes = [(one.outcome, other.outcome) for one, other in zip(right, wrong, strict=False)]
    return [
        Graded(example, one.transcript.text, one.score, other.transcript.text, other.score)
        for example, (one, other) in zip(examples, outcomes, strict=False)
    ]


def _played(examples: Sequence[Example], policies: Sequence[Policy], scorer: Scorer) -> list[Game]:
    """The games of examples, each played by a policy."""

    def prepare(example: Example) -> Problem:
        return Problem(example, example.prompt or "", ())

    def complete(live: Sequence[Game]) -> Iterator[Completion]:
        for number, game in enumerate(live):
            yield Completion(number, 0, policies[game.question](game.trajectory.messages), (), "stop")

    games = [new_game(prepare(example), number) for number, example in enumerate(examples)]
    play(games, scorer, prepare, complete)
    return games


def _said(game: Game) -> list[str]:
    opening = len(announce(game.problem.example).messages)
    return [message["content"] for message in game.trajectory.messages[opening::2]]


def _worked_solution(task: SingleTurnTask, example: Example) -> str | None:
    try:
        return task.worked_solution(example)
    except ValueError:  # by which it says that it knows none
        return None


def _processes(verifier: VerifierSpec, rollouts: int) -> int:
    """One for each core, but one alone for a reward model, which takes every core itself and much memory."""
    if "reward_model" in verifier_names(verifier):
        return 1
    return max(1, min(rollouts, len(os.sched_getaffinity(0))))


def _rollout(record: Any, place: str, task: SingleTurnTaskConfig) -> Rollout:
    if not isinstance(record, Mapping) or not isinstance(record.get("completion"), str):
        raise ValueError(f"{place} is not an object with `prompt` and `completion`")
    prompt = record.get("prompt")
    messages = None
    if isinstance(prompt, list) and all(map(_is_message, prompt)):
        messages = tuple(prompt)
        prompt = "\n".join(message["content"] for message in messages)
    if not isinstance(prompt, str):
        raise ValueError(f"{place}: `prompt` is {prompt!r:.60}; accepted is text or a list of messages")
    try:
        answer = task.reference(record)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    return Rollout(
        prompt, record["completion"], answer, record, messages, _token_ids(record, place), _finish_reason(record, place)
    )


def _token_ids(record: Mapping[str, Any], place: str) -> tuple[int, ...]:
    found = record.get("token_ids")
    if found is None:
        return ()
    if not isinstance(found, list) or not all(type(each) is int and each >= 0 for each in found):
        raise ValueError(f"{place}: `token_ids` is {found!r:.60}; accepted is a list of whole numbers")
    return tuple(found)


def _finish_reason(record: Mapping[str, Any], place: str) -> str:
    found = record.get("finish_reason")
    if found is not None and not isinstance(found, str):
        raise ValueError(f"{place}: `finish_reason` is {found!r:.60}; accepted is text, such as stop or length")
    return found or "stop"


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
