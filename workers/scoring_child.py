"""The process a verifier runs in: rollouts in, scores out, one after the other; started by workers.scoring.

Messages are JSON, one a line, on a socket that nothing else uses. Never pickle: this process ran on hostile text.

    in    {"name": ..., "options": ..., "memory_bytes": ...}     first: the verifier, and a limit or null
    out   {"error": ..., "takes": ...}           why it cannot be loaded, or null: it is ready; what the verifier takes
    in    {"ticket": ..., "rollouts": [{...}]}                   then any number of these
    out   {"ticket": ..., "scores": [{...}], "failures": [...]}  kinds of failure or null; in the order of the tickets
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import math
import os
import resource
import signal
import sys
from typing import Any, BinaryIO, Literal

from rewards.base import InvalidScore, Rollout, Score, Verifier, VerifierSpec, judge_now, takes

Failure = Literal["timeout", "exception", "invalid value", "died", "out of memory"]

MAX_ERROR = 500  # characters of an error that are passed on
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def main(descriptor: int, parent: int) -> None:
    """Serve the process `parent` on the socket `descriptor` until it hangs up."""
    _die_with(parent)
    requests, replies = os.fdopen(descriptor, "rb"), os.fdopen(os.dup(descriptor), "wb")
    os.register_at_fork(after_in_child=lambda: _hang_up(requests, replies))
    opening = json.loads(requests.readline())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if opening["memory_bytes"] is not None:
        resource.setrlimit(resource.RLIMIT_AS, (opening["memory_bytes"], opening["memory_bytes"]))
    try:
        verifier = _load(VerifierSpec(opening["name"], opening["options"]))
    except ValueError as error:
        _send(replies, {"error": str(error), "takes": None})
        return
    _send(replies, {"error": None, "takes": takes(verifier)})
    with asyncio.Runner() as runner:
        for line in requests:
            request = json.loads(line)
            judged = _judge(verifier, [_rollout(fields) for fields in request["rollouts"]], runner)
            scores, failures = [_fields(score) for score, _ in judged], [failure for _, failure in judged]
            _send(replies, {"ticket": request["ticket"], "scores": scores, "failures": failures})


def plain_score(score: Score) -> Score:
    """The same score in finite floats, short text and what JSON can write.

    Raises TypeError, ValueError and the like where it cannot be.
    """
    return Score(
        value=None if score.value is None else _finite(score.value),
        components={str(name): _finite(part) for name, part in score.components.items()},
        accuracy=None if score.accuracy is None else _finite(score.accuracy),
        error=None if score.error is None else str(score.error)[:MAX_ERROR],
        notes=_plain(score.notes),
    )


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies: a verifier that hangs would not see a closed socket."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        sys.exit(1)


def _hang_up(*files: BinaryIO) -> None:
    """In a process that a verifier forks: it must neither answer in this one's name nor hold the socket open."""
    for file in files:
        os.close(file.fileno())


def _load(spec: VerifierSpec) -> Verifier:
    try:
        return spec.load()
    except ValueError:
        raise
    except BaseException as error:  # importing a user's file can raise anything, SystemExit too
        raise ValueError(f"verifier: {spec.name} cannot be loaded: {_describe(error)}") from error


def _judge(verifier: Verifier, rollouts: list[Rollout], runner: asyncio.Runner) -> list[tuple[Score, Failure | None]]:
    try:
        scores = judge_now(verifier, rollouts, runner.run)
    except MemoryError:
        return [(Score(None, error="the verifier ran out of memory"), "out of memory")] * len(rollouts)
    except BaseException as error:  # noqa: BLE001 - whatever a verifier raises, sys.exit too, costs these only
        return [(Score(None, error=f"the verifier raised {_describe(error)}"), "exception")] * len(rollouts)
    return [_checked(score) for score in scores]


def _checked(score: Score) -> tuple[Score, Failure | None]:
    try:
        return plain_score(score), "invalid value" if isinstance(score, InvalidScore) else None
    except (ArithmeticError, AttributeError, RecursionError, TypeError, ValueError) as error:
        return Score(None, error=f"the verifier returned an invalid score: {_describe(error)}"), "invalid value"


def _rollout(fields: dict[str, Any]) -> Rollout:
    messages = fields.pop("messages")
    token_ids = tuple(fields.pop("token_ids"))
    return Rollout(**fields, messages=None if messages is None else tuple(messages), token_ids=token_ids)


def _fields(score: Score) -> dict[str, Any]:
    # dataclasses.asdict copies what it finds, at several times the cost.
    return {
        "value": score.value,
        "components": score.components,
        "accuracy": score.accuracy,
        "error": score.error,
        "notes": score.notes,
    }


def _plain(notes: Any) -> dict[str, Any]:
    if not isinstance(notes, dict):
        raise TypeError(f"notes are a {type(notes).__name__}, not a dict")
    plain: dict[str, Any] = json.loads(json.dumps(notes, allow_nan=False)) if notes else {}
    return plain


def _finite(number: Any) -> float:
    if not math.isfinite(number):
        raise ValueError(f"{number} is not finite")
    return float(number)


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:MAX_ERROR]


def _send(replies: BinaryIO, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message).encode() + b"\n")
    replies.flush()


if __name__ == "__main__":
    main(descriptor=int(sys.argv[1]), parent=int(sys.argv[2]))
