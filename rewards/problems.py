"""Random access to the training and the held-out problems of a task, drawn by a seeded generator or read from files.

A problem is a row of plain data. Its key is a text that two rows share exactly where they are the same problem; a hash
of the key assigns it to a split, the same for every seed and source, so the two splits can never share a problem.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rewards.base import Message, Split

Row = dict[str, Any]
Key = Callable[[Row], str]
_T = TypeVar("_T")

HELDOUT_SHARE = 0.3
MAX_DRAWS = 20_000
"""Draws before a generator says that its settings allow no problem."""
HUB = "hub:"
ROLES = ("system", "user", "assistant")
_HUB_NAME = re.compile(r"hub:(?P<name>[^@]+?)(?:@(?P<config>[\w.-]+))?(?::(?P<split>[\w.-]+))?")
_BLOCK = 1024  # held-out problems among which none is repeated, while there are enough
_FRESH_TRIES = 64  # draws of a held-out problem before a repeat is accepted


class Problems(Protocol):
    """Random access to both splits, without end."""

    def row(self, split: Split, index: int) -> Row: ...


class DrawnProblems:
    """Random problems. `draw` makes one of a stream of random numbers, or None where the draw came to nothing; `finish`
    does the rest for one of the split that is asked for, where that takes long, and may still refuse it.

    A training problem depends on (seed, index) alone, and may come again. Held-out problems differ from one another
    within each 1,024 indices (0 to 1023, 1024 to 2047, ...) unless the settings allow too few: a repeat is accepted
    after 64 draws. To know one, all before it in its 1,024 are made, once. Where 20,000 draws give no problem of a
    split, `row` raises ValueError with `field` and what `settings` says of them.
    """

    def __init__(
        self,
        draw: Callable[[random.Random], Row | None],
        key: Key,
        seed: int,
        settings: str,
        split_of: Callable[[str], Split] | None = None,
        finish: Callable[[Row], Row | None] | None = None,
        field: str = "task",
    ) -> None:
        self._draw_row, self._key, self._seed, self._settings, self._field = draw, key, seed, settings, field
        self._finish = finish or (lambda row: row)
        self._split_of = split_of or split_of_key
        self._heldout: dict[int, tuple[list[Row], set[str]]] = {}

    def row(self, split: Split, index: int) -> Row:
        if split == "train":
            return self._draw(split, stream(self._seed, split, index))
        block, position = divmod(index, _BLOCK)
        rows, known = self._heldout.setdefault(block, ([], set()))
        while len(rows) <= position:
            row = self._draw_fresh(stream(self._seed, split, block, len(rows)), known)
            rows.append(row)
            known.add(self._key(row))
        return rows[position]

    def _draw_fresh(self, numbers: random.Random, known: set[str]) -> Row:
        for _ in range(_FRESH_TRIES):
            row = self._draw("heldout", numbers)
            if self._key(row) not in known:
                break
        return row

    def _draw(self, split: Split, numbers: random.Random) -> Row:
        for _ in range(MAX_DRAWS):
            row = self._draw_row(numbers)
            if row is None or self._split_of(self._key(row)) != split:
                continue
            finished = self._finish(row)
            if finished is not None:
                return finished
        raise ValueError(
            f"{self._field}: {MAX_DRAWS} draws gave no {split} problem with {self._settings}; widen one of them"
        )


class StagedProblems:
    """A curriculum: the first training problems come from `stages`, each so many problems of a source, those after
    them from `rest`. Held-out problems are those of `rest`, whatever the stage.

    Training problem number `index` is the one that its source has under this number. Where all sources assign a problem
    to a split alike, as `split_of_key` does, no stage trains on a held-out problem. Raises ValueError where a source
    does.
    """

    def __init__(self, stages: Sequence[tuple[int, Problems]], rest: Problems) -> None:
        self._ends = list(accumulate(count for count, _ in stages))
        self._sources = [*(source for _, source in stages), rest]
        for start in [0, *self._ends]:
            self.row("train", start)  # a stage that allows no problem is refused here, not in the middle of a run

    def row(self, split: Split, index: int) -> Row:
        stage = bisect_right(self._ends, index) if split == "train" else -1
        return self._sources[stage].row(split, index)


def staged(
    curriculum: Sequence[Mapping[str, Any]],
    settings: Sequence[str],
    source: Callable[[Mapping[str, Any], str], Problems],
) -> Problems:
    """The problems of a curriculum (see `StagedProblems`), or without stages those of the task alone.

    A stage has its number of `problems` and those of the `settings` in which it differs from the task, None being no
    difference. `source` makes the problems of such differences, and names what is wrong with them by the field that it
    is given, such as task.curriculum.0 for the first stage. Raises ValueError, naming the stage, for what is no stage.
    """
    stages = []
    for number, stage in enumerate(curriculum):
        field = f"task.curriculum.{number}"
        given = {name: value for name, value in stage.items() if value is not None}
        problems = given.pop("problems", None)
        if not isinstance(problems, int) or problems < 1:
            raise ValueError(f"{field}.problems: {problems!r} is not a number of problems of at least 1")
        if unknown := given.keys() - set(settings):
            raise ValueError(f"{field}: {min(unknown)!r} is not one of problems, {', '.join(settings)}")
        stages.append((problems, source(given, field)))
    rest = source({}, "task")
    return StagedProblems(stages, rest) if stages else rest


class EpochOrder:
    """Which of so many rows is number 0, 1, ... without end: each epoch goes through all rows, in an order of its own
    keyed by (key, epoch)."""

    def __init__(self, rows: int, *key: object) -> None:
        self._rows, self._key = rows, key
        self._order: tuple[int, list[int]] = (-1, [])

    def __getitem__(self, index: int) -> int:
        epoch, position = divmod(index, self._rows)
        if self._order[0] != epoch:
            self._order = epoch, sorted(range(self._rows), key=lambda row: digest(*self._key, epoch, row))
        return self._order[1][position]


class FiledProblems:
    """Problems that were read from files. Rows without a `heldout` file beside them are split by hash; with one,
    training rows whose problem is in the held-out file are left out. Each epoch goes through a split in an order of
    its own, keyed by (seed, epoch). Raises ValueError, naming `source`, where a split is left without a row."""

    def __init__(
        self,
        rows: Sequence[Row],
        heldout: Sequence[Row] | None,
        key: Key,
        seed: int,
        source: str,
        split_of: Callable[[str], Split] | None = None,
    ) -> None:
        split_of = split_of or split_of_key
        held = [row for row in rows if split_of(key(row)) == "heldout"] if heldout is None else list(heldout)
        known = {key(row) for row in held}
        self._rows = {"train": [row for row in rows if key(row) not in known], "heldout": held}
        for split, those in self._rows.items():
            if not those:
                raise ValueError(f"task.data: {source} leaves no row for the {split} split; give it more rows")
        self._orders = {split: EpochOrder(len(those), seed, split) for split, those in self._rows.items()}

    @property
    def training_rows(self) -> int:
        """The rows of the training split, which problems 0, 1, ... go through one by one."""
        return len(self._rows["train"])

    def row(self, split: Split, index: int) -> Row:
        return self._rows[split][self._orders[split][index]]


def split_of_key(key: str) -> Split:
    """The split of a problem by its key: three in ten are held out."""
    return "heldout" if int.from_bytes(digest(key)[:8], "big") / 2**64 < HELDOUT_SHARE else "train"


def read_records(path: Path, field: str) -> list[tuple[str, Any]]:
    """The records of a file of JSON lines or of one JSON list, each with its place for error messages.

    Raises ValueError naming `field`, file and line.
    """
    text = read_text(path, field)
    if text.lstrip().startswith("["):
        records = _json(text, f"{field}: {path}")
        return [(f"{field}: {path}, row {number}", record) for number, record in enumerate(records, 1)]
    return [(place, _json(line, place)) for place, line in lines_of(text, path, field)]


def read_source(source: str, field: str) -> list[tuple[str, Any]]:
    """The records of a file (see `read_records`) or of a hub data set, each with its place for error messages.

    A data set is `hub:owner/name`, with `@config` where it has several and `:split` for another split than train; the
    package datasets fetches it. Raises ValueError naming `field` and source.
    """
    return _hub_records(source, field) if source.startswith(HUB) else read_records(Path(source), field)


def fingerprint(source: str, field: str) -> str:
    """A hash of all that a file, a folder of JSON files or a hub data set holds, by which to tell that it has changed.
    Raises ValueError naming `field` and source where there is none."""
    if source.startswith(HUB):
        return _hub_fingerprint(source, field)
    path = Path(source)
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    whole = hashlib.blake2b(digest_size=16)
    for each in files:
        if not each.is_file():
            raise ValueError(f"{field}: no file {each}")
        with each.open("rb") as file:
            whole.update(each.name.encode() + hashlib.file_digest(file, "blake2b").digest())
    return whole.hexdigest()


def read_text(path: Path, field: str) -> str:
    """What a file holds. Raises ValueError naming `field` and file."""
    if not path.is_file():
        raise ValueError(f"{field}: no file {path}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{field}: {path} is not UTF-8 text ({error.reason} at byte {error.start})") from None


def lines_of(text: str, path: Path, field: str) -> list[tuple[str, str]]:
    """The lines of a file's text that are not blank, each with its place for error messages."""
    lines = [(f"{field}: {path}, line {number}", line) for number, line in enumerate(text.split("\n"), 1)]
    return [(place, line) for place, line in lines if line.strip()]


def as_messages(given: Any) -> tuple[Message, ...] | None:
    """The messages of a chat, a list of objects of role and content, without what else they have; None for what is no
    chat of one message or more."""
    if not isinstance(given, list) or not given or not all(map(_is_message, given)):
        return None
    return tuple({"role": message["role"], "content": message["content"]} for message in given)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and value.get("role") in ROLES and isinstance(value.get("content"), str)


def digest(*key: object) -> bytes:
    """16 bytes that depend on every part of the key."""
    return hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()


def stream(*key: object) -> random.Random:
    """Random numbers keyed by anything."""
    return random.Random(int.from_bytes(digest(*key), "big"))


def below(numbers: random.Random, bound: int) -> int:
    """A random whole number from 0 to bound - 1."""
    # Of random.Random's methods only random() is promised to give the same numbers in every version of Python.
    return int(numbers.random() * bound)


def pick(numbers: random.Random, choices: Sequence[_T]) -> _T:
    """One of the choices, at random."""
    return choices[below(numbers, len(choices))]


def _hub_records(source: str, field: str) -> list[tuple[str, Any]]:
    match = _HUB_NAME.fullmatch(source)
    if match is None:
        raise ValueError(f"{field}: {source!r} is no data set; accepted is hub:owner/name, hub:owner/name@config:split")
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise ValueError(f"{field}: {source} needs the package datasets, which is not installed") from error
    try:
        rows = load_dataset(match["name"], match["config"], split=match["split"] or "train")
    except Exception as error:  # hub, network, cache and parsers raise kinds of their own
        raise ValueError(f"{field}: {source} cannot be loaded: {type(error).__name__}: {error}") from error
    return [(f"{field}: {source}, row {number}", _plain(row)) for number, row in enumerate(rows, 1)]


@cache
def _hub_fingerprint(source: str, field: str) -> str:
    return digest(*(json.dumps(record) for _, record in _hub_records(source, field))).hex()


def _plain(row: Mapping[str, Any]) -> Any:
    """The row as verifiers are sent it: what JSON cannot write, such as a date, is text."""
    return json.loads(json.dumps(dict(row), default=str))


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON ({error})") from None
