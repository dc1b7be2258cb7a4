"""The table of what was brought about, for `make chaos`."""

from __future__ import annotations

import json
import os
from pathlib import Path


def count(fault: str, times: int, stall: float | None = None) -> None:
    """Note a fault that changed nothing, how often it struck and, in seconds, how long it kept the run waiting."""
    if "CHAOS_TABLE" in os.environ:
        with Path(os.environ["CHAOS_TABLE"]).open("a") as table:
            table.write(json.dumps({"fault": fault, "times": times, "stall": stall}) + "\n")
