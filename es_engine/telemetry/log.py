"""The structured log: one JSON object a line, for programs that collect logs.

Every line has `time`, `level`, `run`, `generation` (how many were done) and `message`; notices of the pool have
`worker`, `call` and `chunk` too, generations and evaluations their `figures`, and the last line of a run that failed
the `error`'s type.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

from es_engine.telemetry.base import Line, numbers
from es_engine.telemetry.console import evaluation_text, generation_title
from es_engine.text import discreet
from workers.calls import Notice

LOG = "log.jsonl"
LONGEST_LINE = 1 << 20
LONGEST_ERROR = 2000


class LogTelemetry:
    """Appends to RUN/log.jsonl; each line is handed to the system at once."""

    def __init__(self, run_dir: Path, first_step: int) -> None:
        self._run = run_dir.name
        self._done = first_step
        path = run_dir / LOG
        self._file = path.open("ab+", buffering=0)
        if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            self._file.write(b"\n")  # a process was killed while it wrote
        self._write("info", f"begun after {first_step} generations", starts=True)

    def generation(self, line: Line) -> None:
        self._done = line["step"] + 1
        self._write("info", generation_title(line), figures=dict(numbers(line)))

    def evaluation(self, line: Line) -> None:
        self._write("info", evaluation_text(line), figures=dict(numbers(line)))

    def message(self, text: str) -> None:
        if isinstance(text, Notice):
            self._write("warning", text, **text.about)
        else:
            self._write("info", text)

    def close(self, error: BaseException | None = None) -> None:
        if isinstance(error, Exception):
            self._write("error", str(error), error=type(error).__name__)
        else:
            self._write("info", "ended" if error is None else "interrupted")
        self._file.close()

    def _write(self, level: Literal["info", "warning", "error"], message: str, **fields: object) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        told = discreet(message)
        head = {"time": now, "level": level, "run": self._run, "generation": self._done, "message": told}
        # Halves of surrogate pairs, which are no UTF-8, become the escapes that JSON has for them.
        self._file.write(json.dumps(head | fields, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")


def last_error(run_dir: Path) -> str | None:
    """What ended the last process that trained a run, None if it was no error; of a run without a log, None too. Lines
    that are no log's are passed over."""
    path = run_dir / LOG
    if not path.is_file():
        return None
    last: str | None = None
    with path.open("rb") as file:
        for raw in iter(partial(file.readline, LONGEST_LINE), b""):
            if b'"starts": true' in raw or b'"level": "error"' in raw:
                line = _parsed(raw)
                if line.get("starts") or line.get("level") == "error":
                    last = str(line.get("message"))[:LONGEST_ERROR] if line.get("level") == "error" else None
    return last


def _parsed(raw: bytes) -> dict[str, Any]:
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    return line if isinstance(line, dict) else {}
