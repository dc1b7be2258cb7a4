"""Chat: prompts from files or a hub, and a reward model's opinion of the answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from rewards.base import Example, Message, Split, VerifierSpec
from rewards.problems import FiledProblems, Row, as_messages, digest, read_source
from rewards.reward_model import Device, local_folder

Template = Literal["chat", "plain"]

COLUMNS = ("prompt", "messages")
"""Where a row's prompt is, the first of these that it has, unless `fields` says otherwise."""


class Chat:
    """The chat task: prompts without a right answer.

    Args:
        data: a file of rows or `hub:owner/name` (see `read_rows`).
        heldout_data: another; without it, rows of the first are held out.
        fields: the columns of `prompt` and `answer`, where they are not called that.
        system: a system message that opens each chat without one.
        template: `chat`, or `plain`: the prompt's text as it stands, for a model without roles.
        reward_model: what scores the answers: a local folder or a hub id, which is fetched here.
        max_length, output, device: of the reward model (see `reward_model_verifier`).
        seed: of the prompts' order. It does not move one from one split to the other.
        max_tokens, stop: for generation; left out, 512 tokens and no text.
        verifier: a user's own (see `VerifierSpec`) in place of the reward model.

    Raises ValueError, naming the field, for values that give no prompts or contradict each other, and where nothing
    scores the answers.
    """

    def __init__(
        self,
        *,
        data: str,
        heldout_data: str | None = None,
        fields: Mapping[str, str | None] | None = None,
        system: str | None = None,
        template: Template = "chat",
        reward_model: str | None = None,
        max_length: int = 2048,
        output: int = 0,
        device: Device = "cpu",
        seed: int = 0,
        max_tokens: int | None = None,
        stop: Sequence[str] | None = None,
        verifier: str | None = None,
    ) -> None:
        _check(template, system, fields)
        self.max_tokens = 512 if max_tokens is None else max_tokens
        self.stop = () if stop is None else tuple(stop)
        if reward_model is not None and verifier in (None, "reward_model"):
            options = {"max_length": max_length, "output": output, "device": device}
            folder = local_folder(reward_model, "task.reward_model")
            self.verifier = VerifierSpec("reward_model", {"model": str(folder), **options})
        elif verifier is not None:
            self.verifier = VerifierSpec(verifier)
        else:
            raise ValueError(
                "task.reward_model: nothing scores the answers; give a reward model, or task.verifier, or parts under "
                "task.reward that each name a verifier"
            )
        self._template, self._system = template, system
        rows = read_rows(data, "task.data", template, fields)
        heldout = None if heldout_data is None else read_rows(heldout_data, "task.heldout_data", template, fields)
        self._problems = FiledProblems(rows, heldout, problem_key, seed, data)
        self.rows: int | None = self._problems.training_rows

    def example(self, split: Split, index: int) -> Example:
        """Prompt number `index` (from 0) of a split; a pure function of its arguments.

        The answer is the row's, empty where it has none, and `info` the row as it was found.
        """
        row = self._problems.row(split, index)
        name = digest(problem_key(row)).hex()[:12] if row["id"] is None else row["id"]
        answer, record, chat = row["answer"] or "", row["record"], row["chat"]
        if self._template == "plain":
            return Example(name, answer, record, prompt=chat[-1]["content"])
        if self._system is not None and chat[0]["role"] != "system":
            chat = ({"role": "system", "content": self._system}, *chat)
        return Example(name, answer, record, messages=chat)

    def worked_solution(self, example: Example) -> str:
        """The row's answer. Raises ValueError where it has none: no answer is right, and none is known to be good."""
        if not example.answer:
            raise ValueError(f"task: the row of prompt {example.id} has no answer, and no other is known")
        return example.answer


def read_rows(source: str, field: str, template: Template, fields: Mapping[str, str | None] | None = None) -> list[Row]:
    """The prompts of a source: rows `{"chat": (...), "answer": ..., "id": ..., "record": {...}}`, the last as it was
    found.

    A row's prompt is text, or a chat: a list of messages with `role` and `content`, the last of them the user's. It is
    under `prompt`, or else `messages`; a good answer may be under `answer`, as text, and a name under `id`. `fields`
    names other columns for prompt and answer. With the plain template, a prompt is text only. Raises ValueError naming
    `field`, source (see `read_source`) and row.
    """
    prompt, answer = ((fields or {}).get(name) for name in ("prompt", "answer"))
    columns = COLUMNS if prompt is None else (prompt,)
    return [_row(record, place, columns, answer or "answer", template) for place, record in read_source(source, field)]


def problem_key(row: Row) -> str:
    """The whole chat but for the system message, whatever its spacing."""
    said = [message for message in row["chat"] if message["role"] != "system"]
    return "\n".join(f"{message['role']}: {' '.join(message['content'].split())}" for message in said)


def _row(record: Any, place: str, columns: Sequence[str], answer: str, template: Template) -> Row:
    column = next((name for name in columns if isinstance(record, dict) and name in record), None)
    if column is None:
        raise ValueError(f"{place} is not an object with {' or '.join(f'`{name}`' for name in columns)}")
    given, good, name = record[column], record.get(answer), record.get("id")
    chat = _chat(given)
    if chat is None or (template == "plain" and not isinstance(given, str)):
        accepted = "text" if template == "plain" else "text or a list of messages of which the last is the user's"
        raise ValueError(f"{place}: `{column}` is {given!r:.60}; accepted is {accepted}")
    if good is not None and not isinstance(good, str):
        raise ValueError(f"{place}: `{answer}` is {good!r:.60}; accepted is text or nothing")
    return {"chat": chat, "answer": good, "id": None if name is None else str(name), "record": record}


def _chat(given: Any) -> tuple[Message, ...] | None:
    """The messages of a prompt, or None for what is no prompt."""
    if isinstance(given, str):
        return ({"role": "user", "content": given},) if given.strip() else None
    chat = as_messages(given)
    return chat if chat is not None and chat[-1]["role"] == "user" else None


def _check(template: str, system: str | None, fields: Mapping[str, str | None] | None) -> None:
    if template not in get_args(Template):
        raise ValueError(f"task.template: {template!r} is not one of {', '.join(get_args(Template))}")
    if system is not None and template == "plain":
        raise ValueError("task.system: a plain prompt has no system message; leave it out, or else task.template")
    if unknown := set(fields or {}) - {"prompt", "answer"}:
        raise ValueError(f"task.fields: {min(unknown)!r} is not one of prompt, answer")
