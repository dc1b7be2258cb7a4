"""Verifiers in killable processes: whatever a verifier does to its process costs what it was asked about, no more.

One thread, the supervisor, owns every child process. It sleeps only in poll(), and no longer than to the next
deadline; it never blocks on a child's socket, so neither side can make the other wait for ever. A child works
through its jobs in order, so the first of them is the one it is at: that one's clock runs from the reply before it,
and that one is charged when the child is late, dies or cannot be started. The others go to another child. A job is one
rollout, or those that the verifier takes at once.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args

from es_engine.config import TaskConfigModel
from rewards.base import Rollout, Score, Takes, VerifierSpec
from workers.chunks import NO_SCORE
from workers.scoring_child import MAX_ERROR, Failure, plain_score

WINDOW = 16  # jobs a child holds while it is quick, so that it need not wait for this process's attention after each
SLOW_WINDOW = 2  # jobs a child holds when it is not, so that none waits behind a slow one while another child is idle
QUICK = 0.01  # seconds a job
BATCH = 32  # rollouts for a verifier that takes batches
RECYCLE = 20_000  # rollouts after which a child gives way to a fresh one, with all that its verifier has hoarded
MAX_REPLY = 1 << 20  # bytes
REAP_TIMEOUT = 30.0  # seconds; only a process stuck in the kernel outlives SIGKILL


def open_scorer(task: TaskConfigModel, verifier: VerifierSpec, processes: int = 1) -> Scorer:
    """A scorer within the limits of a task's config. Raises ValueError where the verifier cannot be loaded."""
    memory_bytes = None if task.memory_gb is None else int(task.memory_gb * 1e9)
    return Scorer(verifier, processes, task.deadline, memory_bytes)


class Scorer:
    """Scores rollouts in child processes while the caller does something else.

    `deadline` is in seconds, for each rollout, from when the verifier starts on it; `memory_bytes` limits a child's
    address space; `start_timeout` is in seconds, for loading the verifier; a
    child is replaced after `recycle` rollouts. `failures` counts the rollouts that have
    no score by kind: timeout, exception, invalid value, died, out of memory, or no score where the verifier gave none.

    Raises ValueError where the verifier cannot be loaded.
    """

    def __init__(
        self,
        verifier: VerifierSpec,
        processes: int = 1,
        deadline: float = 5.0,
        memory_bytes: int | None = None,
        start_timeout: float = 60.0,
        recycle: int = RECYCLE,
    ) -> None:
        self.failures: Counter[str] = Counter()
        self._verifier = verifier
        self._processes = processes
        self._deadline = deadline
        self._memory_bytes = memory_bytes
        self._start_timeout = start_timeout
        self._recycle = recycle
        self._takes: Takes = "rollout"
        self._children: list[_Child] = []
        self._tickets = itertools.count()
        self._todo: deque[_Job] = deque()
        self._changed = threading.Condition()  # guards what follows
        self._unscored: set[Hashable] = set()
        self._scores: dict[Hashable, Score] = {}
        self._started = self._stopped = self._closing = False
        self._crash: Exception | None = None
        self._wake = os.eventfd(0)
        self._supervisor = threading.Thread(target=self._supervise, name="scorer", daemon=True)
        self._supervisor.start()
        try:
            self._wait_for(lambda: self._started)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, key: Hashable, rollout: Rollout) -> None:
        """Have a rollout scored; returns at once.

        Raises ValueError where the key was used since the last drain, TypeError where the rollout is not JSON.
        """
        self.submit_group([key], [rollout])

    def submit_group(self, keys: Sequence[Hashable], rollouts: Sequence[Rollout]) -> None:
        """The same for all completions of one prompt by one member, which a verifier that takes a group sees
        together; they share as many deadlines as they are."""
        jobs = [_Job((key,), [_line(rollout)]) for key, rollout in zip(keys, rollouts, strict=True)]
        if self._takes == "group":
            jobs = [_Job(tuple(keys), [line for job in jobs for line in job.lines])]
        with self._changed:
            if self._closing or self._stopped:
                raise self._crash or RuntimeError("the scorer is closed")
            for key in keys:
                if key in self._unscored or key in self._scores:
                    raise ValueError(f"scorer: the key {key!r} was submitted twice")
            self._unscored.update(keys)
            self._todo.extend(jobs)
            os.eventfd_write(self._wake, 1)

    def drain(self) -> dict[Hashable, Score]:
        """Wait until everything submitted is scored; the scores since the last drain, by key."""
        with self._changed:
            self._wait_for(lambda: not self._unscored)
            scores, self._scores = self._scores, {}
        return scores

    def close(self) -> None:
        """Kill the children; what is not scored yet never will be."""
        with self._changed:
            if self._closing:
                return
            self._closing = True
            os.eventfd_write(self._wake, 1)
        self._supervisor.join()
        os.close(self._wake)

    def _wait_for(self, done: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: done() or self._stopped)
            if not done():
                raise self._crash or RuntimeError("the scorer is closed")

    # From here on everything runs in the supervisor. It starts the children itself, because the kernel kills them
    # with the thread that started them (prctl(2), PR_SET_PDEATHSIG), not with the process.

    def _supervise(self) -> None:
        try:
            self._run()
        except Exception as error:  # noqa: BLE001 - raised again in the thread that waits
            self._crash = error
        finally:
            with self._changed:
                self._stopped = True
                self._changed.notify_all()

    def _run(self) -> None:
        try:
            self._children.extend(self._start_child() for _ in range(self._processes))
            while not self._closing:
                self._dispatch()
                self._attend()
        finally:
            for child in self._children:
                child.kill()

    def _start_child(self) -> _Child:
        return _Child(self._verifier, self._memory_bytes, self._start_timeout, self._deadline, self._recycle)

    def _dispatch(self) -> None:
        while self._todo and len(self._children) < self._processes:
            self._children.append(self._start_child())
        while self._todo and (takers := [child for child in self._children if child.takes_more]):
            min(takers, key=lambda child: len(child.jobs)).give(self._next_job(), next(self._tickets))
        for child in self._children:
            child.flush()

    def _next_job(self) -> _Job:
        """The next of what there is to do; for a verifier that takes batches, as much of it as makes one."""
        job = self._todo.popleft()
        if self._takes == "batch":
            while self._todo and len(job.keys) + len(self._todo[0].keys) <= BATCH:
                more = self._todo.popleft()
                job = _Job(job.keys + more.keys, job.lines + more.lines)
        return job

    def _attend(self) -> None:
        """Sleep until there is something to do; take what the children replied; end those that are late."""
        # A child is late if its time was up before the look at its socket that found nothing: a reply that came
        # while this thread was not scheduled still counts.
        now = time.monotonic()
        ready = self._poll(min(child.expires for child in self._children) - now if self._children else math.inf)
        for child in list(self._children):
            try:
                if child.socket.fileno() in ready:
                    self._take_replies(child)
                if child.expires <= now:
                    raise child.late()
            except _ChildFailure as failure:
                self._remove(child, failure)

    def _poll(self, seconds: float) -> set[int]:
        """The descriptors that are ready, after `seconds` at most."""
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        for child in self._children:
            poll.register(child.socket, select.POLLIN | (select.POLLOUT if child.outgoing else 0))
        ready = {descriptor for descriptor, _ in poll.poll(None if seconds == math.inf else max(0, seconds * 1000))}
        if self._wake in ready:
            os.eventfd_read(self._wake)
        return ready

    def _take_replies(self, child: _Child) -> None:
        for line in child.receive():
            if child.ready:
                scores, failures = _parse_scores(line, child.jobs)
                self._finish(child.done(), scores, failures)
            else:
                self._takes = child.start(line)
        if child.is_spent:
            child.kill()
            self._children.remove(child)
        if not self._started and all(child.ready for child in self._children):
            with self._changed:
                self._started = True
                self._changed.notify_all()

    def _remove(self, child: _Child, failure: _ChildFailure) -> None:
        """End a child, charge the job it was at and put the rest back; _dispatch starts another when there is work."""
        child.kill()
        self._children.remove(child)
        if not self._started:
            raise ValueError(str(failure))
        if child.jobs:
            job = child.jobs.popleft()
            count = len(job.keys)
            self._finish(job, [Score(None, error=str(failure))] * count, [failure.kind] * count)
        self._todo.extendleft(reversed(child.jobs))

    def _finish(self, job: _Job, scores: Sequence[Score], failures: Sequence[Failure | None]) -> None:
        with self._changed:
            for key, score, failure in zip(job.keys, scores, failures, strict=True):
                self._scores[key] = score
                self._unscored.remove(key)
                if failure is not None:
                    self.failures[failure] += 1
                elif score.value is None:
                    self.failures[NO_SCORE] += 1
            if not self._unscored:
                self._changed.notify_all()


@dataclass(slots=True)
class _Job:
    """Rollouts that are judged together, each a line of JSON; a ticket once a child has them."""

    keys: tuple[Hashable, ...]
    lines: list[bytes]
    ticket: int = -1


class _ChildFailure(Exception):
    """A child is of no further use, and the job it was at has no score."""

    def __init__(self, kind: Failure, error: str) -> None:
        super().__init__(error)
        self.kind = kind


class _Child:
    """One verifier process as its parent sees it: what it has to do, until when, what was not yet written or read."""

    def __init__(
        self, verifier: VerifierSpec, memory_bytes: int | None, start_timeout: float, deadline: float, recycle: int
    ) -> None:
        self.verifier = verifier
        self.recycle = recycle
        self.given = 0
        self.start_timeout = start_timeout
        self.deadline = deadline
        self.socket, theirs = socket.socketpair()
        self.socket.setblocking(False)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "workers.scoring_child", str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=2,  # a verifier may print: to stderr
                pass_fds=[theirs.fileno()],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
                start_new_session=True,
            )
        self.ready = False
        self.window = 1  # the job that is charged should it not start
        self.jobs: deque[_Job] = deque()
        self.expires = time.monotonic() + start_timeout
        self.outgoing = bytearray(json.dumps(asdict(verifier) | {"memory_bytes": memory_bytes}).encode() + b"\n")
        self.incoming = b""

    @property
    def takes_more(self) -> bool:
        return len(self.jobs) < self.window and self.given < self.recycle

    @property
    def is_spent(self) -> bool:
        return not self.jobs and self.given >= self.recycle

    def give(self, job: _Job, ticket: int) -> None:
        job.ticket = ticket
        self.given += len(job.keys)
        self.jobs.append(job)
        self.outgoing += b'{"ticket": %d, "rollouts": [%b]}\n' % (ticket, b", ".join(job.lines))
        if self.ready and len(self.jobs) == 1:
            self._start_clock()

    def start(self, line: bytes) -> Takes:
        """Take its first reply, which says what the verifier takes. Raises _ChildFailure if it could not be loaded."""
        reply = json.loads(line)
        if reply["error"]:
            raise _ChildFailure("died", reply["error"])
        self.ready = True
        self.window = SLOW_WINDOW
        self._start_clock()
        return reply["takes"]

    def done(self) -> _Job:
        # If it was this thread that was slow to look, the second of two replies still shows that the child is quick.
        job = self.jobs.popleft()
        took = time.monotonic() - (self.expires - len(job.keys) * self.deadline)
        self.window = WINDOW if took < QUICK else SLOW_WINDOW
        self._start_clock()
        return job

    def flush(self) -> None:
        """Write as much as the socket takes."""
        try:
            while self.outgoing:
                del self.outgoing[: self.socket.send(self.outgoing)]
        except BlockingIOError:
            pass
        except ConnectionError:  # it is gone, and receive() will say so
            self.outgoing.clear()

    def receive(self) -> list[bytes]:
        """The whole lines that have come. Raises _ChildFailure when there will be no more, or a line is too long."""
        try:
            data = self.socket.recv(1 << 16)
        except BlockingIOError:
            return []
        except ConnectionError:  # it left requests unread
            data = b""
        if not data:
            raise _ChildFailure("died", f"verifier: the process of {self.verifier.name} died ({_ending(self.kill())})")
        *lines, self.incoming = (self.incoming + data).split(b"\n")
        if len(self.incoming) > MAX_REPLY:
            raise _ChildFailure("invalid value", f"the verifier's score is longer than {MAX_REPLY} bytes")
        return lines

    def late(self) -> _ChildFailure:
        if self.ready:
            seconds = len(self.jobs[0].keys) * self.deadline
            return _ChildFailure("timeout", f"verifier: {self.verifier.name} took longer than {seconds:g} s")
        return _ChildFailure(
            "timeout", f"verifier: {self.verifier.name} took longer than {self.start_timeout:g} s to load"
        )

    def kill(self) -> int:
        """End the process and its group; returns how it ended, as subprocess does. May be called again."""
        self.socket.close()
        if self.process.returncode is None:  # once it is reaped, the group's number may be someone else's
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait(REAP_TIMEOUT)

    def _start_clock(self) -> None:
        self.expires = time.monotonic() + len(self.jobs[0].keys) * self.deadline if self.jobs else math.inf


_FIELDS = tuple(field.name for field in fields(Rollout))


def _line(rollout: Rollout) -> bytes:
    row = {name: getattr(rollout, name) for name in _FIELDS}
    return json.dumps(row, default=dict).encode()


def _parse_scores(line: bytes, jobs: deque[_Job]) -> tuple[list[Score], list[Failure | None]]:
    """Read the reply to the first job. Trusts nothing: hostile text may have got the better of the verifier."""
    try:
        reply: dict[str, Any] = json.loads(line)
        scores = [plain_score(Score(**score)) for score in reply["scores"]]
        failures = list(reply["failures"])
        known = {None, *get_args(Failure)}
        if reply["ticket"] != jobs[0].ticket or not known.issuperset(failures):
            raise ValueError("not a reply to the rollout it is at")
        if not len(scores) == len(failures) == len(jobs[0].keys):
            raise ValueError("not as many scores as rollouts")
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise _ChildFailure("invalid value", f"the verifier's process sent rubbish: {error}"[:MAX_ERROR]) from error
    if "out of memory" in failures:  # what the process still holds could cost the next rollout its score too
        raise _ChildFailure("out of memory", str(scores[0].error))
    return scores, failures


def _ending(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {-code}, {signal.strsignal(-code)}"
