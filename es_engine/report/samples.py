"""Held-out completions for the page: as many as the file has room for.

The same problems are kept of every evaluation, so that what changed can be read side by side: of a run's share of the
room, half goes to its first and last evaluation, and the rest to evaluations evenly spaced between them, if there are
any.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from es_engine.ledger import read_samples
from es_engine.report.data import RunData, RunGroup

ROOM = 4_000_000
"""Most bytes of samples in a report, about."""

LONGEST = 6_000
"""Most characters of a text; of a longer one the beginning and the end are kept."""

NOTES_LONGEST = 2_000

Rows = list[dict[str, Any]]


def samples(groups: Sequence[RunGroup], room: int = ROOM) -> dict[str, Any]:
    """Of each run the evaluations, by step, that were kept, and how many rows there are; texts that occur in many rows,
    such as prompts, are places in `texts`. Of a run whose samples are damaged there are none, and a sentence in
    `problems` says so."""
    texts: dict[str, int] = {}
    problems: list[str] = []
    named = [each for group in groups for each in zip(group.run_labels, group.runs, strict=True)]
    share = room // max(1, len(named))
    kept = [_of_run(label, run, share, texts, problems) for label, run in named]
    return {"runs": kept, "texts": list(texts), "problems": problems}


def _of_run(label: str, run: RunData, room: int, texts: dict[str, int], problems: list[str]) -> dict[str, Any]:
    try:
        found = _kept(run, room, texts)
    except ValueError as error:
        problems.append(str(error))
        found = {"rows": 0, "evaluations": 0, "steps": {}}
    return {"key": run.key, "name": label, **found}


def _kept(run: RunData, room: int, texts: dict[str, int]) -> dict[str, Any]:
    steps = [line["step"] for line in run.evaluations if run.samples_file(line["step"]).is_file()]
    kept: dict[int, Rows] = {}
    total = 0
    if steps:
        ends = {step: _read(run.samples_file(step)) for step in {steps[0], steps[-1]}}
        total = max(map(len, ends.values()))
        places = _evenly(total, _fitting(room // 2 if len(steps) > 2 else room, _size(ends.values()), total))
        kept = {step: _at(places, rows) for step, rows in ends.items()}
        between = steps[1:-1]
        taken = _size(kept.values())
        fitting = _fitting(room - taken, taken * len(between) // len(kept), len(between))
        for step in (between[place] for place in _between(len(between), fitting)):
            kept[step] = _at(places, _read(run.samples_file(step)))
    return {
        "rows": total,
        "evaluations": len(steps),
        "steps": {str(step): [_compact(row, texts) for row in rows] for step, rows in sorted(kept.items())},
    }


def _read(path: Path) -> Rows:
    """The rows of a file of samples, texts shortened, and numbered where a problem has several. Raises ValueError for a
    line that is none."""
    rows = []
    seen: dict[str, int] = {}
    for row in read_samples(path):
        number = seen[row["id"]] = seen.get(row["id"], -1) + 1
        rows.append(
            {
                "key": f"{row['id']}#{number + 1}" if number else str(row["id"]),
                "prompt": _shortened(row["prompt"], LONGEST),
                "answer": _shortened(_as_text(row.get("answer")), NOTES_LONGEST),
                "completion": _shortened(row["completion"], LONGEST),
                "reward": row["reward"],
                "accuracy": row["accuracy"],
                "components": row.get("components") or {},
                "tokens": row.get("tokens"),
                "notes": _shortened(_as_text(row.get("notes")), NOTES_LONGEST),
            }
        )
    return rows


def _compact(row: dict[str, Any], texts: dict[str, int]) -> dict[str, Any]:
    shared = {name: texts.setdefault(row[name], len(texts)) for name in ("key", "prompt", "answer")}
    return {**row, **shared}


def _at(places: Sequence[int], rows: Rows) -> Rows:
    return [rows[place] for place in places if place < len(rows)]


def _size(tables: Iterable[Rows]) -> int:
    """About how many bytes tables of rows take."""
    return sum(len(json.dumps(row)) for rows in tables for row in rows)


def _fitting(room: int, size: int, count: int) -> int:
    """How many of `count` things of this size together fit; `room` may be used up, and more."""
    room = max(0, room)
    return count if size <= room else count * room // size


def _evenly(count: int, chosen: int) -> list[int]:
    """So many places out of `count`, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, chosen).astype(int)).tolist() if chosen else []


def _between(count: int, chosen: int) -> list[int]:
    """So many places out of `count`, evenly spaced between two that are taken, one before them and one after."""
    return np.linspace(-1, count, chosen + 2)[1:-1].round().astype(int).tolist()


def _shortened(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]} […{len(text) - 2 * half} characters left out…] {text[-half:]}"


def _as_text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
