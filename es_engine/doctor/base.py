"""What a finding is, and what the files say that findings are made from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

GIB = 1 << 30
Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Check:
    """One finding; `remedy` says what to do where the status is not ok."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


def read(path: str | Path) -> str:
    """The text of a file of the kernel's, empty where there is none or it may not be read."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def fields(text: str, name: str) -> list[str]:
    """All words after the colon of every line that begins with `name`."""
    lines = (line.partition(":") for line in text.splitlines())
    return [word for key, _, value in lines if key.strip() == name for word in value.split()]


def last_line(text: str) -> str:
    """What a program said last, which of a Python traceback is the error."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no word of why")
