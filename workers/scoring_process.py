"""A process that a verifier runs in, as its parent sees it; `workers.scoring_child` is what runs there.

It works through its jobs in order, so the first of them is the one it is at: that one's clock runs from the reply
before it, and that one is charged when the process is late, dies for the second time or cannot be started.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Hashable, Iterator
from dataclasses import asdict, dataclass, fields
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, get_args

from rewards.base import Rollout, Score, Takes, VerifierSpec
from workers.scoring_child import MAX_ERROR, Failure, Mark, plain_score

WINDOW = 128  # jobs in hand at most
SLOW_WINDOW = 2  # jobs in hand at least, so that the next is there when one is done
AHEAD = 0.02  # seconds of work in hand: more of it could wait behind a slow job while another process is idle
SUSPECT = 0.25  # of a job's deadline: one that takes longer has probably hung
WANING = 0.9  # of the rollouts that a process is for
MAX_REPLY = 1 << 20  # bytes
OWN_PACKAGES = str(Path(__file__).parents[1])
REAP_TIMEOUT = 30.0  # seconds; only a process stuck in the kernel outlives SIGKILL


@dataclass(frozen=True, slots=True)
class Limits:
    """What a process may take: `deadline` seconds a rollout, `start_timeout` seconds for loading the verifier,
    `memory_bytes` of address space (None is any), and `recycle` rollouts in its life."""

    deadline: float
    start_timeout: float
    memory_bytes: int | None
    recycle: int


@dataclass(slots=True)
class Job:
    """Rollouts that are judged together, each as JSON. One process died at them if they are judged `again`."""

    keys: tuple[Hashable, ...]
    rollouts: list[bytes]
    again: bool = False

    def __add__(self, other: Job) -> Job:
        return Job(self.keys + other.keys, self.rollouts + other.rollouts)


class Verdict(NamedTuple):
    """What came of a rollout: its score, and the kinds of failure by the name of the verifier or of its part."""

    key: Hashable
    score: Score
    failures: dict[str, Failure]


class ProcessFailure(Exception):
    """A process is of no further use, and the job it was at has no score, which counts against verifier `name`; unless
    the process was `perhaps_killed` by others, who may spare the next."""

    def __init__(self, name: str, kind: Failure, error: str, *, perhaps_killed: bool = False) -> None:
        super().__init__(error)
        self.name = name
        self.kind = kind
        self.perhaps_killed = perhaps_killed


class ScoringProcess:
    """A process with what it has to do, until when, and what was not yet written or read.

    `expires` is when it will be late, and `heir_due` when it will probably be gone soon, so that another one should be
    started to be ready then; both on the clock of time.monotonic().
    """

    def __init__(self, verifier: VerifierSpec, limits: Limits) -> None:
        self.takes: Takes = "rollout"
        self.ready = False
        self.jobs: deque[Job] = deque()
        self.expires = time.monotonic() + limits.start_timeout
        self.heir_due = math.inf
        self._verifier = verifier
        self._limits = limits
        self._parts: tuple[str, ...] = ()
        self._window = 1  # the job that is charged should it not start
        self._pace = 0.0  # seconds a job
        self._clock = 0.0  # when it began the job it is at
        self._given = 0  # rollouts
        self._done = 0  # jobs
        opening = asdict(verifier) | {"memory_bytes": limits.memory_bytes}
        self._outgoing = bytearray(json.dumps(opening).encode() + b"\n")
        self._incoming = b""
        self.socket, self._mark, self._process = _start()

    @property
    def takes_more(self) -> bool:
        return len(self.jobs) < self._window and self._given < self._limits.recycle

    @property
    def is_spent(self) -> bool:
        return not self.jobs and self._given >= self._limits.recycle

    @property
    def has_unsent(self) -> bool:
        return bool(self._outgoing)

    @property
    def work_ahead(self) -> float:
        """Seconds of work in hand, after the job it is at, going by its pace."""
        return max(0, len(self.jobs) - 1) * self._pace

    def give(self, job: Job) -> None:
        before, self._given = self._given, self._given + len(job.keys)
        self.jobs.append(job)
        self._outgoing += b"[%b]\n" % b",".join(job.rollouts)
        if self.ready and len(self.jobs) == 1:
            self._start_clock()
        if before < WANING * self._limits.recycle <= self._given:
            self.heir_due = -math.inf

    def flush(self) -> None:
        """Write as much as the socket takes."""
        try:
            while self._outgoing:
                del self._outgoing[: self.socket.send(self._outgoing)]
        except BlockingIOError:
            pass
        except ConnectionError:  # it is gone, and verdicts() will say so
            self._outgoing.clear()

    def verdicts(self) -> Iterator[list[Verdict]]:
        """Those on each job to which a reply has come. Raises ProcessFailure where no more can come, or rubbish did."""
        lines = self._receive()
        for line in lines:
            if self.ready:
                yield self._read(line)
            else:
                self._open(line)
        if lines:
            self._set_pace(len(lines))
            self._start_clock()

    def late(self) -> ProcessFailure:
        name = self._asked
        if not self.ready:
            return ProcessFailure(
                name, "timeout", f"verifier: {name} took longer than {self._limits.start_timeout:g} s to load"
            )
        seconds = len(self.jobs[0].keys) * self._limits.deadline
        return ProcessFailure(name, "timeout", f"verifier: {name} took longer than {seconds:g} s")

    def charge(self, failure: ProcessFailure) -> list[Verdict]:
        """Take away the job it was at; the verdicts on it, none where there was no job."""
        keys = self.jobs.popleft().keys if self.jobs else ()
        return [Verdict(key, Score(None, error=str(failure)), {failure.name: failure.kind}) for key in keys]

    def kill(self) -> int:
        """End the process and its group; returns how it ended, as subprocess does. May be called again.

        One that is stuck in a driver or a dead network disk is left to the kernel, which ends it when it can.
        """
        self.socket.close()
        self._mark.close()
        if self._process.returncode is None:  # once it is reaped, the group's number may be someone else's
            os.killpg(self._process.pid, signal.SIGKILL)
        try:
            return self._process.wait(REAP_TIMEOUT)
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL

    @property
    def _asked(self) -> str:
        """The verifier, or the part of it, that the process is at."""
        return self._mark.name(self._parts, self._verifier.name)

    def _receive(self) -> list[bytes]:
        """The whole lines that have come."""
        try:
            data = self.socket.recv(1 << 16)
        except BlockingIOError:
            return []
        except ConnectionError:  # it left requests unread
            data = b""
        if not data:
            name = self._asked
            error = f"verifier: the process of {name} died ({_ending(self.kill())})"
            raise ProcessFailure(name, "died", error, perhaps_killed=True)
        *lines, self._incoming = (self._incoming + data).split(b"\n")
        if len(self._incoming) > MAX_REPLY:
            raise ProcessFailure(
                self._verifier.name, "invalid value", f"the verifier's score is longer than {MAX_REPLY} bytes"
            )
        return lines

    def _open(self, line: bytes) -> None:
        """Take its first reply, which says what the verifier is, or why it could not be loaded."""
        reply = json.loads(line)
        if reply["error"]:
            raise ProcessFailure(self._verifier.name, "died", reply["error"])
        self.ready = True
        self.takes = reply["takes"]
        self._parts = tuple(reply["parts"])

    def _read(self, line: bytes) -> list[Verdict]:
        """Read the reply to the first job. Trusts nothing: hostile text may have got the better of the verifier."""
        name = self._verifier.name
        try:
            reply: dict[str, Any] = json.loads(line)
            scores = [Score(**plain_score(**score)) for score in reply["scores"]]
            failures = [_known(each, {name, *self._parts}) for each in reply["failures"]]
            keys = self.jobs[0].keys
            if reply["job"] != self._done:
                raise ValueError("not a reply to the job it is at")
            if not len(scores) == len(failures) == len(keys):
                raise ValueError("not as many scores as rollouts")
            if any(score.value is None and not kinds for score, kinds in zip(scores, failures, strict=True)):
                raise ValueError("neither a score nor a failure")
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            rubbish = f"the verifier's process sent rubbish: {error}"[:MAX_ERROR]
            raise ProcessFailure(name, "invalid value", rubbish) from error
        for score, kinds in zip(scores, failures, strict=True):
            for part, kind in kinds.items():
                if kind == "out of memory":  # what the process still holds could cost the next rollout its score too
                    raise ProcessFailure(part, kind, str(score.error))
        self._done += 1
        self.jobs.popleft()
        return [Verdict(*each) for each in zip(keys, scores, failures, strict=True)]

    def _set_pace(self, jobs: int) -> None:
        """Take more jobs in hand while they are quick, and few once they are not."""
        if self._window == 1:
            self._window = SLOW_WINDOW
            return
        self._pace = max(time.monotonic() - self._clock, 1e-6) / jobs
        self._window = min(WINDOW, self._window + jobs, max(SLOW_WINDOW, int(AHEAD / self._pace)))

    def _start_clock(self) -> None:
        """Time the first job from now on."""
        self._clock = time.monotonic()
        seconds = len(self.jobs[0].keys) * self._limits.deadline if self.jobs else math.inf
        self.expires = self._clock + seconds
        self.heir_due = self._clock + SUSPECT * seconds


def _start() -> tuple[socket.socket, Mark, subprocess.Popen[bytes]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with theirs, open(os.memfd_create("mark", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "r+b") as memory:
        memory.truncate(Mark.SIZE)
        # To read memory whose file the child has cut short would kill this process.
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        descriptors = theirs.fileno(), memory.fileno()
        process = subprocess.Popen(
            # -P and the path: what lies in the current directory hides none of the modules that are imported here.
            [sys.executable, "-P", "-m", "workers.scoring_child", *map(str, [*descriptors, os.getpid()])],
            stdin=subprocess.DEVNULL,
            stdout=2,  # a verifier may print: to stderr
            pass_fds=descriptors,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([*filter(None, sys.path), OWN_PACKAGES, os.getcwd()])},
            start_new_session=True,
        )
        return ours, Mark(memory.fileno()), process


_KINDS = set(get_args(Failure))


def _known(failures: dict[str, Failure], names: set[str]) -> dict[str, Failure]:
    if not (names.issuperset(failures) and _KINDS.issuperset(failures.values())):
        raise ValueError("failures of no such verifier or kind")
    return failures


_FIELDS = tuple(field.name for field in fields(Rollout))
_values = attrgetter(*_FIELDS)
_encode = json.JSONEncoder(default=dict).encode


def encode(rollout: Rollout) -> bytes:
    """A rollout as JSON. Raises TypeError where it cannot be."""
    return _encode(dict(zip(_FIELDS, _values(rollout), strict=True))).encode()


def _ending(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {-code}, {signal.strsignal(-code)}"
