"""The process a verifier runs in: rollouts in, scores out, one job after the other; started by workers.scoring_process.

Messages are JSON, one a line, on a socket that nothing else uses. Never pickle: this process ran on hostile text.

    in    {"name": ..., "options": ..., "memory_bytes": ...}    first: the verifier, and a limit or null
    out   {"error": ..., "takes": ..., "parts": [...]}          why it cannot be loaded, or null: it is ready; what the
                                                                verifier takes, the names of its parts if it is a sum
    in    [{...}, ...]                                          then any number of these: a job, the rollouts of it
    out   {"job": ..., "scores": [{...}], "failures": [{...}]}  its number, in order from 0; kinds of failure by the
                                                                name of the verifier or of its part
"""

from __future__ import annotations

import ctypes
import itertools
import json
import math
import mmap
import os
import resource
import signal
import socket
import struct
import sys
from collections.abc import Coroutine, Iterator
from functools import cache
from typing import Any, Literal

from rewards.base import NO_SCORE, InvalidScore, Rollout, Score, Verifier, VerifierSpec, judge_now, parts, takes

Failure = Literal["timeout", "exception", "invalid value", "died", "out of memory", "no score"]
Judged = tuple[dict[str, Any], dict[str, Failure]]
"""The fields of a score as plain data, and the kinds of failure by verifier."""

MAX_ERROR = 500  # characters of an error that are passed on
ROUNDING = 1e-9  # by which an accuracy may be outside 0 to 1
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def main(descriptor: int, mark_descriptor: int, parent: int) -> None:
    """Serve the process `parent` on the socket `descriptor` until it hangs up."""
    _die_with(parent)
    link, mark = socket.socket(fileno=descriptor), Mark(mark_descriptor)
    held: list[Any] = [link, mark]
    os.register_at_fork(after_in_child=lambda: _hang_up(held))
    held.append(_guarded())
    lines = _lines(link)
    opening = json.loads(next(lines))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if opening["memory_bytes"] is not None:
        resource.setrlimit(resource.RLIMIT_AS, (opening["memory_bytes"], opening["memory_bytes"]))
    try:
        verifier = _load(VerifierSpec(opening["name"], opening["options"]))
    except ValueError as error:
        _send(link, {"error": str(error), "takes": None, "parts": []})
        return
    judge = _Judge(verifier, opening["name"], mark)
    _send(link, {"error": None, "takes": takes(verifier), "parts": parts(verifier).names})
    for job, line in enumerate(lines):
        scores, failures = zip(*judge([_rollout(fields) for fields in json.loads(line)]), strict=True)
        _send(link, {"job": job, "scores": scores, "failures": failures})


class Mark:
    """Which part of a sum a child is asking: in memory that its parent reads when the child can no longer say so."""

    _PLACE = struct.Struct("=I")
    SIZE = _PLACE.size

    def __init__(self, descriptor: int) -> None:
        """`descriptor` is of a file of SIZE bytes, and may be closed afterwards."""
        self._memory = mmap.mmap(descriptor, self.SIZE)

    def set(self, place: int) -> None:
        """Say which part is asked; -1 is none yet."""
        self._PLACE.pack_into(self._memory, 0, place + 1)

    def name(self, names: tuple[str, ...], whole: str) -> str:
        """The name of the part that is asked, or of the whole verifier where there is none."""
        (place,) = self._PLACE.unpack_from(self._memory)
        return names[place - 1] if 0 < place <= len(names) else whole

    def close(self) -> None:
        self._memory.close()


_NOTHING: dict[str, Any] = {}


def plain_score(
    value: Any, components: Any = _NOTHING, accuracy: Any = None, error: Any = None, notes: Any = _NOTHING
) -> dict[str, Any]:
    """Those fields of a score that say something, in finite floats, short text and what JSON can write.

    Raises TypeError, ValueError and the like where it cannot be.
    """
    plain: dict[str, Any] = {"value": None if value is None else _finite(value)}
    if numbers := {str(name): _finite(part) for name, part in components.items()}:
        plain["components"] = numbers
    if accuracy is not None:
        plain["accuracy"] = _share(accuracy)
    if error is not None:
        plain["error"] = str(error)[:MAX_ERROR]
    if notes != {}:
        plain["notes"] = _plain(notes)
    return plain


class _Judge:
    """A verifier whose every answer, whatever it is, becomes plain scores and failures."""

    def __init__(self, verifier: Verifier, name: str, mark: Mark) -> None:
        self._verifier = verifier
        self._name = name
        self._mark = mark
        self._parts = parts(verifier)
        self._parts.tell = mark.set

    def __call__(self, rollouts: list[Rollout]) -> list[Judged]:
        self._mark.set(-1)
        try:
            scores = judge_now(self._verifier, rollouts, _run)
        except MemoryError:
            return [self._failed("out of memory", "the verifier ran out of memory")] * len(rollouts)
        except BaseException as error:  # noqa: BLE001 - whatever a verifier raises, sys.exit too, costs these only
            return [self._failed("exception", f"the verifier raised {_describe(error)}")] * len(rollouts)
        return [self._checked(score) for score in scores]

    def _failed(self, kind: Failure, error: str) -> Judged:
        return plain_score(None, error=error), {self._mark.name(self._parts.names, self._name): kind}

    def _checked(self, score: Score) -> Judged:
        try:
            plain = plain_score(score.value, score.components, score.accuracy, score.error, score.notes)
            return plain, self._failures(score)
        except (ArithmeticError, AttributeError, RecursionError, TypeError, ValueError) as error:
            invalid = f"the verifier returned an invalid score: {_describe(error)}"
            return plain_score(None, error=invalid), {self._name: "invalid value"}

    def _failures(self, score: Score) -> dict[str, Failure]:
        missing = [name for name in score.missing if name in self._parts.names]
        if score.value is None and not missing:
            missing = [self._name]
        kind: Failure = "invalid value" if isinstance(score, InvalidScore) else NO_SCORE
        return dict.fromkeys(missing, kind)


def _run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return _runner().run(coroutine)


@cache
def _runner() -> Any:
    import asyncio  # few verifiers need it, and it would be a third of the start

    return asyncio.Runner()


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies: a verifier that hangs would not see a closed socket."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        sys.exit(1)


def _guarded() -> Any:
    """Have another process end the group, and with it what a verifier has started, as soon as this one is gone: the
    kernel ends this one alone when its parent dies. What comes back is open as long as this process lives."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.close(writer)
        while os.read(reader, 1 << 12):  # there is nothing more to read once the last writer is gone
            pass
        os.killpg(0, signal.SIGKILL)
    os.close(reader)
    return os.fdopen(writer, "wb")


def _hang_up(held: list[Any]) -> None:
    """In a process that a verifier forks: it must neither answer in this one's name, nor hold the socket open, nor pass
    for this one."""
    for each in held:
        each.close()


def _load(spec: VerifierSpec) -> Verifier:
    try:
        return spec.load()
    except ValueError:
        raise
    except BaseException as error:  # importing a user's file can raise anything, SystemExit too
        raise ValueError(f"verifier: {spec.name} cannot be loaded: {_describe(error)}") from error


def _rollout(fields: dict[str, Any]) -> Rollout:
    messages = fields.pop("messages")
    token_ids = tuple(fields.pop("token_ids"))
    return Rollout(**fields, messages=None if messages is None else tuple(messages), token_ids=token_ids)


def _plain(notes: Any) -> dict[str, Any]:
    if not isinstance(notes, dict):
        raise TypeError(f"notes are a {type(notes).__name__}, not a dict")
    plain: dict[str, Any] = json.loads(json.dumps(notes, allow_nan=False))
    return plain


def _finite(number: Any) -> float:
    if not math.isfinite(number):
        raise ValueError(f"{number} is not finite")
    return float(number)


def _share(number: Any) -> float:
    share = _finite(number)
    if not -ROUNDING <= share <= 1 + ROUNDING:
        raise ValueError(f"accuracy {number} is not of 0 to 1")
    return min(max(share, 0.0), 1.0)


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:MAX_ERROR]


def _lines(link: socket.socket) -> Iterator[bytes]:
    """The lines that come, until there will be no more."""
    begun: list[bytes] = []
    while data := link.recv(1 << 16):
        first, *others = data.split(b"\n")
        begun.append(first)
        if others:
            yield b"".join(begun)
            yield from itertools.islice(others, len(others) - 1)
            begun = [others[-1]]


def _send(link: socket.socket, message: dict[str, Any]) -> None:
    link.sendall(json.dumps(message).encode() + b"\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
