"""Programs that tests start, with a cache of their own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

TIMEOUT_S = 400


def run(command: Sequence[str | Path], folder: Path) -> str:
    """Run a command in a folder, under which its cache lies; what it printed."""
    environment = {**os.environ, "ES_ENGINE_CACHE": str(folder / "cache")}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
