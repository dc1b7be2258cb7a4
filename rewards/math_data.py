"""Where maths problems come from: files and hub data sets, each with columns of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from rewards.answers import extract
from rewards.problems import FiledProblems, Row, digest, read_source

Dataset = Literal["gsm8k", "math500", "aime24", "amc23", "olympiadbench", "minerva", "custom"]

COLUMNS: dict[Dataset, tuple[str, str]] = {
    "gsm8k": ("question", "answer"),
    "math500": ("problem", "answer"),
    "aime24": ("problem", "answer"),
    "amc23": ("problem", "answer"),
    "olympiadbench": ("question", "final_answer"),
    "minerva": ("problem", "solution"),
    "custom": ("question", "answer"),
}
"""The columns that a data set's question and reference answer are read from, where nothing else is said."""


def filed(
    data: str, heldout_data: str | None, dataset: Dataset, fields: Mapping[str, str | None], seed: int
) -> FiledProblems:
    """Problems from files or a hub (see `read_rows` and `FiledProblems`)."""
    rows = read_rows(data, "task.data", dataset, fields)
    heldout = None if heldout_data is None else read_rows(heldout_data, "task.heldout_data", dataset, fields)
    return FiledProblems(rows, heldout, problem_key, seed, data)


def read_rows(source: str, field: str, dataset: Dataset, fields: Mapping[str, str | None] | None = None) -> list[Row]:
    """The problems of a source: rows `{"question": ..., "answer": ..., "record": {...}}`, the last as it was found.

    `read_source` says what a source is. `fields` names other columns for `question` and `answer` than `COLUMNS`. How
    the reference answer is read from its column:

    gsm8k: what follows the last ####.
    minerva: what the last \\boxed{} of the solution holds.
    olympiadbench: the items of the list, with commas between.
    the others: the text, or the number (27.0 is 27).

    Raises ValueError naming `field`, source and row.
    """
    columns = _columns(dataset, fields or {})
    return [_row(record, place, dataset, *columns) for place, record in read_source(source, field)]


def reference_of(row: Mapping[str, Any], dataset: Dataset, fields: Mapping[str, str | None], needed: bool) -> str:
    """The reference answer of a row as `read_rows` reads it, or else the `answer` that it has alone, as samples have.
    Where it has neither it is empty, or if it is needed ValueError is raised."""
    _, column = _columns(dataset, fields)
    reference = _reference(row.get(column), dataset) or _text(row.get("answer"))
    if needed and not reference:
        alone = ", or the answer alone under `answer`"
        raise ValueError(f"`{column}` is {row.get(column)!r:.60}; accepted is {_ACCEPTED[dataset]}{alone}")
    return reference or ""


def problem_key(row: Row) -> str:
    """The question, whatever its spacing."""
    return " ".join(row["question"].split())


def identity(row: Row) -> str:
    """A short name of a problem, the same wherever it is found."""
    return digest(problem_key(row)).hex()[:12]


def _columns(dataset: Dataset, fields: Mapping[str, str | None]) -> tuple[str, str]:
    question, answer = COLUMNS[dataset]
    return fields.get("question") or question, fields.get("answer") or answer


def _row(record: Any, place: str, dataset: Dataset, question: str, answer: str) -> Row:
    if not isinstance(record, dict):
        raise ValueError(f"{place} is not an object with `{question}` and `{answer}`")
    asked = record.get(question)
    if not isinstance(asked, str) or not asked.strip():
        raise ValueError(f"{place}: `{question}` is {asked!r:.60}; accepted is the question as text")
    reference = _reference(record.get(answer), dataset)
    if not reference:
        raise ValueError(f"{place}: `{answer}` is {record.get(answer)!r:.60}; accepted is {_ACCEPTED[dataset]}")
    return {"question": asked, "answer": reference, "record": record}


def _reference(value: Any, dataset: Dataset) -> str | None:
    """The reference answer that a column's value holds, None where there is none."""
    if dataset == "gsm8k" or dataset == "minerva":
        form: Literal["hash", "boxed"] = "hash" if dataset == "gsm8k" else "boxed"
        return extract(value, form) if isinstance(value, str) else None
    if dataset == "olympiadbench":
        items = [_text(item) for item in value] if isinstance(value, list) else []
        return ", ".join(item.strip("$") for item in items if item) if all(items) else None
    return _text(value)


def _text(value: Any) -> str | None:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip() if isinstance(value, (str, int, float)) and not isinstance(value, bool) else None


_ACCEPTED: dict[Dataset, str] = dict.fromkeys(get_args(Dataset), "the answer as text or as a number") | {
    "gsm8k": "text that ends in #### and the answer",
    "minerva": "text with the answer in \\boxed{}",
    "olympiadbench": "a list of one or more answers",
}
