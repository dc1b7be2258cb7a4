"""The append-only history of a run: `ledger.jsonl`, one JSON object a line.

The first line (`kind: run`) says what the run is; `kind: calibration` holds the sigma found before the first
generation; each `kind: generation` line holds everything that made that step. In a run of several stages a line of
`kind: stage` begins each. A line is on disk, whole, before its step counts as done.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from functools import partial
from io import FileIO
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from es_engine import ledger_lines
from es_engine.costs import Costs

Line = dict[str, Any]

LONGEST = 1 << 28
"""Bytes of a line: a generation of ten million rollouts has less."""

LONGEST_SAMPLE = 1 << 26
"""Bytes of a completion with its prompt and its scores."""

WHERE_AND_WHEN = frozenset({"times", "workers", "restarts", "speculative", "rescored"})
"""Keys that tell two ledgers of the same run apart without making them different, beside the seconds in `costs`."""

ROLLOUTS = frozenset({"members", "prompts", "rewards", "fitness"})
"""Keys of a generation whose values are as long as it had members, prompts or rollouts."""


class Ledger:
    """A file of JSON lines that only grows."""

    def __init__(self, path: Path) -> None:
        """Reads the file, if there is one, and leaves it as it is: a run may be writing it. A last line that was cut
        off while it was written counts for nothing, and is taken away by the first `append`.

        Raises ValueError if any other line is damaged.
        """
        self.path = path
        reader = LedgerReader(path)
        self.lines: list[Line] = list(reader.new_lines())
        self._whole = reader.bytes_read
        self._forgotten = 0

    def append(self, line: Line) -> None:
        """Add a line and wait until it is on disk. On a full disk nothing is left of it."""
        data = json.dumps(line, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        with self.path.open("ab", buffering=0) as file:  # a buffer would be flushed once more by close
            try:
                file.truncate(self._whole)
                _write_all(file, data)
                os.fsync(file.fileno())
            except OSError:
                os.truncate(self.path, self._whole)
                raise
        self._whole += len(data)
        self.lines.append(line)

    def forget_rollouts(self) -> None:
        """Let go of what the lines so far hold of single rollouts, which only a replay asks for: of thousands of steps
        it would be gigabytes."""
        for line in self.lines[self._forgotten :]:
            for key in ROLLOUTS & line.keys():
                del line[key]
        self._forgotten = len(self.lines)

    def of_kind(self, kind: str) -> list[Line]:
        """The lines of one kind, in order."""
        return [line for line in self.lines if line["kind"] == kind]

    @property
    def generations(self) -> list[Line]:
        """The lines of the generations done so far; line i is step i."""
        return self.of_kind("generation")

    @property
    def stages(self) -> list[Line]:
        """The lines that begin the stages so far; none in a run that has no stages."""
        return self.of_kind("stage")

    @property
    def present_stage(self) -> list[Line]:
        """The lines since the last stage began; all of them in a run that has no stages."""
        return self.lines[self.lines.index(self.stages[-1]) :] if self.stages else self.lines

    @property
    def header(self) -> Line:
        """The first line. Raises ValueError if the ledger is empty."""
        if not self.lines:
            raise ValueError(f"{self.path}: the ledger is empty")
        return self.lines[0]


class LedgerReader:
    """Reads a ledger that another process may be writing, and leaves the file as it is."""

    def __init__(self, path: Path) -> None:
        """Reads nothing yet."""
        self.path = path
        self.lines_read = 0
        self.bytes_read = 0

    def new_lines(self) -> Iterator[Line]:
        """The whole lines since those that were read before; none if there is no such file. One that is being written
        is left for the next time.

        Raises ValueError if any line but the last is damaged, or if one holds what no run writes.
        """
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self.bytes_read)
            for raw in iter(partial(file.readline, LONGEST), b""):
                line = _parsed(raw)
                if line is None:
                    if len(raw) < LONGEST and (not raw.endswith(b"\n") or not file.read(1)):
                        return
                    raise ValueError(
                        f"{self.path}: line {self.lines_read + 1} is damaged; "
                        f"the ledger cannot be used past line {self.lines_read}"
                    )
                self.lines_read += 1
                self.bytes_read += len(raw)
                self._check(line)
                yield line

    def _check(self, line: Line) -> None:
        try:
            ledger_lines.check(line)
        except ValueError as error:
            raise ValueError(f"{self.path}: line {self.lines_read} is none of a run's: {error}") from None


def read_samples(path: Path) -> Iterator[Line]:
    """The completions of an evaluation, one row each. Raises ValueError, naming file and line, for one that is none."""
    with path.open("rb") as file:
        for number, raw in enumerate(iter(partial(file.readline, LONGEST_SAMPLE), b""), start=1):
            try:
                row: Line = json.loads(raw)
                ledger_lines.check_sample(row)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}: line {number} is no completion of an evaluation ({error})") from None
            yield row


def running_costs(generations: Iterable[Line]) -> list[Costs]:
    """What a run had spent before its first step and after each: entry k is the sum over the first k lines."""
    return list(accumulate((Costs.from_json(line["costs"]) for line in generations), initial=Costs()))


def fingerprint(theta: npt.NDArray[np.float32]) -> str:
    """A hash of theta's exact bits."""
    return hashlib.blake2b(np.ascontiguousarray(theta).tobytes(), digest_size=16).hexdigest()


def first_difference(one: Path, other: Path) -> str | None:
    """Where two ledgers first differ but for times and places, in a sentence; None if they do not.

    Raises ValueError if one of them cannot be read.
    """
    left, right = (_comparable(path) for path in (one, other))
    for number, (mine, theirs) in enumerate(zip(left, right, strict=False), start=1):
        if mine != theirs:
            step = f" (step {mine['step']})" if "step" in mine else ""
            where, here, there = innermost_difference(mine, theirs)
            return f"line {number}{step}: {where} is {_short(here)} in {one} and {_short(there)} in {other}"
    if len(left) != len(right):
        longer, extra = (one, len(left) - len(right)) if len(left) > len(right) else (other, len(right) - len(left))
        return f"{longer} has {extra} more lines"
    return None


def innermost_difference(mine: Any, theirs: Any, where: str = "") -> tuple[str, Any, Any]:
    """The first place in two unequal values where they differ, such as `rewards[3][0]`, and what each has there."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        same = {key for key in mine.keys() & theirs.keys() if mine[key] == theirs[key]}
        key = min((mine.keys() | theirs.keys()) - same)
        return innermost_difference(mine.get(key), theirs.get(key), f"{where}.{key}" if where else key)
    if isinstance(mine, list) and isinstance(theirs, list) and len(mine) == len(theirs):
        place = next(place for place, pair in enumerate(zip(mine, theirs, strict=True)) if pair[0] != pair[1])
        return innermost_difference(mine[place], theirs[place], f"{where}[{place}]")
    return where, mine, theirs


def _comparable(path: Path) -> list[Line]:
    if not path.is_file():
        raise ValueError(f"{path}: no such ledger")
    return [_without_where_and_when(line) for line in LedgerReader(path).new_lines()]


def _without_where_and_when(line: Line) -> Line:
    kept = {key: value for key, value in line.items() if key not in WHERE_AND_WHEN}
    if "costs" in kept:
        kept["costs"] = {measure: value for measure, value in kept["costs"].items() if measure != "worker_seconds"}
    return kept


def _write_all(file: FileIO, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _parsed(raw: bytes) -> Line | None:
    """A line of a ledger from its bytes; None if they are not a whole one."""
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    whole = raw.endswith(b"\n") and isinstance(line, dict) and isinstance(line.get("kind"), str)
    return line if whole else None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
