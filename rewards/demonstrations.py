"""What supervised methods learn from: prompts with an answer to give, or with a better and a worse one.

Rows are as TRL reads them. A demonstration is `prompt` and `completion`, or a chat under `messages` whose last message
is the assistant's. A preference is `prompt`, `chosen` and `rejected`, or `chosen` and `rejected` alone, two chats that
begin alike. A prompt, and an answer beside it, is text or a list of messages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rewards.base import Example, Message
from rewards.problems import as_messages, digest, read_source

Prompt = str | tuple[Message, ...]
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A prompt and the completion to learn. The example's answer is the completion."""

    example: Example
    completion: str


@dataclass(frozen=True, slots=True)
class Preference:
    """A prompt, a completion of it and a worse one. The example's answer is the better one."""

    example: Example
    chosen: str
    rejected: str


def read_demonstrations(source: str, field: str) -> list[Demonstration]:
    """The demonstrations of a file or hub data set (see `read_source`). Raises ValueError naming `field`, source and
    row for one without a completion."""
    return [_demonstration(record, place) for place, record in read_source(source, field)]


def read_preferences(source: str, field: str) -> list[Preference]:
    """The preferences of a file or hub data set (see `read_source`). Raises ValueError naming `field`, source and row
    for one without a better or a worse answer, or whose chats do not begin alike."""
    return [_preference(record, place) for place, record in read_source(source, field)]


def _demonstration(record: Any, place: str) -> Demonstration:
    row = _object(record, place, "`prompt` and `completion`, or `messages`")
    prompt: Prompt
    if "messages" in row and "completion" not in row:
        prompt, completion = _cut(row, "messages", place)
    else:
        prompt, completion = _prompt(row, place), _answer(row, "completion", place)
    return Demonstration(_example(row, prompt, completion), completion)


def _preference(record: Any, place: str) -> Preference:
    row = _object(record, place, "`prompt`, `chosen` and `rejected`")
    prompt: Prompt
    if "prompt" in row:
        prompt, chosen, rejected = _prompt(row, place), _answer(row, "chosen", place), _answer(row, "rejected", place)
    else:
        (prompt, chosen), (other, rejected) = (_cut(row, column, place) for column in ("chosen", "rejected"))
        if prompt != other:
            raise ValueError(f"{place} has no `prompt`, and `chosen` and `rejected` differ before their last message")
    return Preference(_example(row, prompt, chosen), chosen, rejected)


def _object(record: Any, place: str, wanted: str) -> Row:
    if not isinstance(record, dict):
        raise ValueError(f"{place} is not an object with {wanted}")
    return record


def _prompt(row: Row, place: str) -> Prompt:
    if "prompt" not in row:
        raise ValueError(f"{place} has no `prompt`")
    given = row["prompt"]
    return given if isinstance(given, str) else _question(_chat(row, "prompt", place), "prompt", place)


def _answer(row: Row, column: str, place: str) -> str:
    """The text of an answer, which may be a chat of one message."""
    if column not in row:
        raise ValueError(f"{place} has no `{column}`")
    given = row[column]
    if isinstance(given, str):
        return given
    chat = _chat(row, column, place)
    if len(chat) != 1 or chat[0]["role"] != "assistant":
        raise ValueError(f"{place}: `{column}` is {given!r:.40}; accepted is text or one message, the assistant's")
    return chat[0]["content"]


def _chat(row: Row, column: str, place: str) -> tuple[Message, ...]:
    if column not in row:
        raise ValueError(f"{place} has no `{column}`")
    chat = as_messages(row[column])
    if chat is None:
        raise ValueError(f"{place}: `{column}` is {row[column]!r:.60}; accepted is text or a list of role and content")
    return chat


def _cut(row: Row, column: str, place: str) -> tuple[tuple[Message, ...], str]:
    """A chat up to the assistant's last message, and that."""
    *before, last = _chat(row, column, place)
    if last["role"] != "assistant":
        raise ValueError(f"{place}: the last message of `{column}` is the {last['role']}'s, not the assistant's")
    return _question(tuple(before), column, place), last["content"]


def _question(chat: tuple[Message, ...], column: str, place: str) -> tuple[Message, ...]:
    if not chat or chat[-1]["role"] != "user":
        raise ValueError(f"{place}: `{column}` has no message of the user before the assistant's answer")
    return chat


def _example(row: Row, prompt: Prompt, answer: str) -> Example:
    name = str(row["id"]) if row.get("id") is not None else digest(prompt).hex()[:12]
    if isinstance(prompt, str):
        return Example(name, answer, row, prompt=prompt)
    return Example(name, answer, row, messages=prompt)
