"""Text on its way to a reader, on a terminal or in a log: it may be anybody's, and say anything."""

from __future__ import annotations

import os
import re
import sys
import unicodedata
from datetime import timedelta
from pathlib import Path

SECRET = re.compile("TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL")
"""In the name of an environment variable that holds one."""
SHORTEST_SECRET = 8
"""Characters; a shorter value, such as `true`, is none."""
HIDDEN = "***"

LONGEST = 1e10
"""Seconds; more is no time at all."""

_BEFORE_HOST = re.compile(r"(?<=://)[^\s/@]+@")
_HARMLESS = "\n\t\u200c\u200d"  # with the joiners that writing systems need, as on the report's page


def visible(text: str) -> str:
    """The text with what a terminal would obey or not show (control characters, those that turn the direction of
    writing, halves of a surrogate pair) by its number, as in U+001B, but for line breaks and tabs."""
    if text.isprintable():
        return text
    return "".join(each if _can_be_seen(each) else f"U+{ord(each):04X}" for each in text)


def _can_be_seen(character: str) -> bool:
    return character in _HARMLESS or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


def discreet(text: str) -> str:
    """The text without names and passwords in addresses, and without the values of environment variables that by their
    name hold a secret: what a library says of a request that failed may quote them."""
    text = _BEFORE_HOST.sub(f"{HIDDEN}@", text)
    for name, value in os.environ.items():
        if len(value) >= SHORTEST_SECRET and SECRET.search(name.upper()):
            text = text.replace(value, HIDDEN)
    return text


def name_of(path: Path) -> str:
    """What a file or folder is called, with U+FFFD for what of that is no UTF-8."""
    return os.fsencode(path.resolve().name).decode(errors="replace")


def tell(text: str) -> None:
    """Print on stderr what may hold anybody's words."""
    print(visible(discreet(text)), file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """A time that something takes, as H:MM:SS, from a day on with days."""
    return str(timedelta(seconds=round(min(seconds, LONGEST))))
