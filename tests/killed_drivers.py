"""Kills drivers, each with its worker in it, at random instants, and has the next one go on: see `main`."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
from small_runs import resume_here, train_here

from es_engine.config import load_config

LIFE_S = 3.0


def main() -> None:
    """CONFIG RUN KILLS SEED: runs called RUN-0, RUN-1 ..., as many as it takes for so many drivers to be killed; prints
    how often each of them was. They end undisturbed. Processes are forked, so that what takes time is the run."""
    config, run, kills, seed = sys.argv[1:]
    torch.set_num_threads(1)
    rng, left, number = random.Random(int(seed)), int(kills), 0
    while left > 0:
        began = left
        while drive(Path(config), Path(f"{run}-{number}"), rng.uniform(0, LIFE_S) if left > 0 else None):
            left -= 1
        print(began - left, flush=True)
        number += 1


def drive(config: Path, run: Path, life: float | None) -> bool:
    """Begin a run or go on with it, in a process that is killed after so many seconds; whether it was."""
    child = os.fork()
    if child == 0:
        try:
            if (run / "config.yaml").exists():
                resume_here(run)
            else:
                train_here(load_config(config), run)
        except Exception:  # noqa: BLE001 - shown, and told by the exit code
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    deadline = None if life is None else time.monotonic() + life
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if deadline is not None and time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            deadline = None
        time.sleep(0.001)
    if os.WIFSIGNALED(status):
        return True
    if os.WEXITSTATUS(status):
        raise SystemExit("a driver failed")
    return False


if __name__ == "__main__":
    main()
