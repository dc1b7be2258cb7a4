"""The command line, run in this process: a process of its own takes seconds to import what a run needs."""

from __future__ import annotations

import io
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from unittest.mock import patch

from es_engine import cli


def refusal(*arguments: object) -> str:
    """The one sentence of a command that refuses its input with exit code 2."""
    output = io.StringIO()
    handlers = {number: signal.getsignal(number) for number in cli.INTERRUPTS}
    try:
        with (
            patch.object(sys, "argv", ["es-engine", *map(str, arguments)]),
            redirect_stdout(output),
            redirect_stderr(output),
        ):
            cli.main()
        code: object = 0
    except SystemExit as end:
        code = end.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert code == 2, output.getvalue()
    lines = [line for line in output.getvalue().splitlines() if line.startswith("es-engine: ")]
    assert len(lines) == 1, output.getvalue()
    return lines[0].removeprefix("es-engine: ")
