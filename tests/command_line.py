"""The command line, run in this process: a process of its own takes seconds to import what a run needs."""

from __future__ import annotations

import io
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from unittest.mock import patch

from es_engine import cli


def command(*arguments: object) -> tuple[int, str]:
    """Run a command to its end: its exit code and what it printed."""
    output = io.StringIO()
    handlers = {number: signal.getsignal(number) for number in cli.INTERRUPTS}
    try:
        with (
            patch.object(sys, "argv", ["es-engine", *map(str, arguments)]),
            redirect_stdout(output),
            redirect_stderr(output),
        ):
            cli.main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return code, output.getvalue()


def refusal(*arguments: object) -> str:
    """The one sentence of a command that refuses its input with exit code 2."""
    code, output = command(*arguments)
    assert code == 2, output
    lines = [line for line in output.splitlines() if line.startswith("es-engine: ")]
    assert len(lines) == 1, output
    return lines[0].removeprefix("es-engine: ")
