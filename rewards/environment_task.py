"""The task of a user's own environment: games whose first prompts are read from files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rewards.base import Example, Split
from rewards.environments import EnvironmentSpec, Policy, recital
from rewards.problems import FiledProblems, Row, as_messages, digest, read_records


class EnvironmentTask:
    """Games of an environment of one's own, a row of a file each.

    Args:
        environment: the environment (see `EnvironmentSpec`), and `options`, keyword arguments for it.
        data: a file of rows (see `read_rows`).
        heldout_data: another; without it, rows of the first are held out.
        seed: of the games' order. It does not move a game from one split to the other.
        max_tokens, stop: for the generation of one turn; left out, 100 tokens and nothing.

    Raises ValueError, naming the field, for values that give no games. The environment itself is loaded where games are
    played.
    """

    def __init__(
        self,
        *,
        environment: str,
        options: Mapping[str, Any] | None = None,
        data: str | Path,
        heldout_data: str | Path | None = None,
        seed: int = 0,
        max_tokens: int | None = None,
        stop: Sequence[str] | None = None,
    ) -> None:
        self.environment = EnvironmentSpec(environment, dict(options or {}))
        self.verifier = self.environment.verifier
        self.max_tokens = 100 if max_tokens is None else max_tokens
        self.stop = () if stop is None else tuple(stop)
        rows = read_rows(Path(data), "task.data")
        heldout = None if heldout_data is None else read_rows(Path(heldout_data), "task.heldout_data")
        self._problems = FiledProblems(rows, heldout, problem_key, seed, str(data))
        self.rows: int | None = self._problems.training_rows

    def example(self, split: Split, index: int) -> Example:
        """Problem number `index` (from 0) of a split; a pure function of its arguments.

        `info` is the row, the answer its `answer` as text, the name its `id` or, without one, a hash of the row.
        """
        row = self._problems.row(split, index)
        mark = digest(problem_key(row)).hex()
        name = mark[:12] if row.get("id") is None else str(row["id"])
        answer = "" if row.get("answer") is None else str(row["answer"])
        if "messages" in row:
            return Example(name, answer, row, messages=tuple(row["messages"]), hidden=mark)
        return Example(name, answer, row, prompt=row["prompt"], hidden=mark)

    def worked_policy(self, example: Example) -> Policy:
        """Says the texts of the row's `worked` one after the other or, in their place, its answer. Raises ValueError
        for a row with neither."""
        worked = example.info.get("worked") or [example.answer]
        if worked == [""]:
            raise ValueError(f"task.data: the row {example.id} has neither `worked`, texts that play it, nor `answer`")
        return recital(example, worked)


def read_rows(path: Path, field: str) -> list[Row]:
    """The rows of a file of JSON lines or of one JSON list: `prompt`, a text, or `messages`, a chat, and whatever the
    environment reads. Raises ValueError naming `field`, file and row."""
    return [_checked(record, place) for place, record in read_records(path, field)]


def problem_key(row: Row) -> str:
    """All that the row says but its `id`: rows of several files may be numbered alike."""
    return json.dumps({name: value for name, value in row.items() if name != "id"}, sort_keys=True)


def _checked(record: Any, place: str) -> Row:
    if not isinstance(record, dict) or ("prompt" in record) == ("messages" in record):
        raise ValueError(f"{place} is not an object with either `prompt` or `messages`")
    worked = record.get("worked", [])
    if not isinstance(record.get("prompt", ""), str):
        raise ValueError(f"{place}: `prompt` is {record['prompt']!r:.60}; accepted is text")
    if "messages" in record and as_messages(record["messages"]) is None:
        given = record["messages"]
        raise ValueError(f"{place}: `messages` is {given!r:.60}; accepted is a list of objects of role and content")
    if not (isinstance(worked, list) and all(isinstance(text, str) for text in worked)):
        raise ValueError(f"{place}: `worked` is {worked!r:.60}; accepted is a list of texts")
    return record
