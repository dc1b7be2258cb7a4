"""Verifiers that do to their process what none should. `score` does whatever a completion says, which is the tests' own
text and may use all that is imported here."""
# ruff: noqa: F401

from __future__ import annotations

import asyncio
import ctypes
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from rewards.base import Rollout, Score, verifier

hoard: list[bytearray] = []


def ignore_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)
    while True:
        pass


def eat_memory() -> None:
    while True:
        hoard.append(bytearray(1 << 24))


def with_grandchild() -> None:
    sleeper = subprocess.Popen(["sleep", "1000"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with open(os.environ["GRANDCHILD"], "w") as file:
        file.write(str(sleeper.pid))
    time.sleep(1000)


def forge() -> None:
    """What text that has taken the process over could write on its socket."""
    for descriptor in range(3, 1000):
        with suppress(OSError):
            os.write(descriptor, os.environ["FORGERY"].encode())
    time.sleep(1000)


def fork_and_return() -> float:
    return 0.25 if os.fork() else 0.75


def noisy() -> int:
    print("to stdout")
    os.write(1, b"x" * 100_000)
    return 1


async def later() -> Score:
    await asyncio.sleep(0.01)
    return Score(0.5, {"format": 0.25}, accuracy=1.0)


async def fail_later() -> None:
    await asyncio.sleep(0.01)
    raise KeyError("async")


@verifier(takes="batch")
async def longest_first(rollouts: Sequence[Rollout]) -> list[float]:
    await asyncio.sleep(0)
    return [len(rollouts)] * len(rollouts)


@verifier(takes="batch")
def dies_once(rollouts: Sequence[Rollout]) -> list[float]:
    if any(rollout.completion == "die" for rollout in rollouts) and os.path.exists(os.environ["ALIVE"]):
        time.sleep(0.3)
        os.unlink(os.environ["ALIVE"])
        os.kill(os.getpid(), signal.SIGKILL)
    return [len(rollouts)] * len(rollouts)


@verifier(takes="group")
def ranks(rollouts: Sequence[Rollout]) -> list[float | None]:
    if any(rollout.completion == "hang" for rollout in rollouts):
        time.sleep(1000)
    if any(rollout.completion == "short" for rollout in rollouts):
        return [0.0]
    lengths = sorted(len(rollout.completion) for rollout in rollouts)
    return [None if rollout.completion == "" else lengths.index(len(rollout.completion)) for rollout in rollouts]


def score(rollout: Rollout) -> Any:
    return eval(rollout.completion)  # noqa: S307


def text_length(rollout: Rollout) -> float:
    return len(rollout.prompt)


def same(rollout: Rollout) -> float:
    """Whether it is the one that the test sent."""
    return float(
        rollout.messages == ({"role": "user", "content": "\ud800 é\n"},)
        and rollout.token_ids == (1, 2)
        and rollout.info == {"numbers": [1, 2], "deep": {"x": None}}
        and rollout.finish_reason == "length"
    )
