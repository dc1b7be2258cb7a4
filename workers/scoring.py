"""Verifiers in killable processes: whatever a verifier does to its process costs what it was asked about, no more.

One thread, the supervisor, owns every child process. It sleeps in poll(), no longer than to the next deadline, and for
a moment while all children are busy, so that their replies gather; it never blocks on a child's socket, so neither side
can make the other wait for ever. A child that is late or cannot be started costs the job it was at its score, and so
does the second that dies at a job: the first may have been killed by others. Its other jobs go to another child. A job
is one rollout, or those that the verifier takes at once.
"""

from __future__ import annotations

import math
import os
import select
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING

from rewards.base import Rollout, Score, Takes, VerifierSpec
from workers.scoring_process import Job, Limits, ProcessFailure, ScoringProcess, Verdict, encode

if TYPE_CHECKING:
    from es_engine.config import TaskConfigModel

BATCH = 32  # rollouts for a verifier that takes batches
START_S = 300.0  # to load a verifier: a reward model may come from a network disk
RECYCLE = 20_000  # rollouts after which a child gives way to a fresh one, with all that its verifier has hoarded
PAUSE = 0.005  # seconds, at most, in which replies gather


def open_scorer(task: TaskConfigModel, verifier: VerifierSpec, processes: int = 1) -> Scorer:
    """A scorer within the limits of a task's config. Raises ValueError where the verifier cannot be loaded."""
    memory_bytes = None if task.memory_gb is None else int(task.memory_gb * 1e9)
    return Scorer(verifier, processes, task.deadline, memory_bytes)


class Scorer:
    """Scores rollouts in child processes while the caller does something else.

    `deadline` is in seconds, for each rollout, from when the verifier starts on it; `memory_bytes` limits a child's
    address space; `start_timeout` is in seconds, for loading the verifier; a child is replaced after `recycle`
    rollouts. There are up to twice as many children as `processes` while some of them have probably hung.

    `failures` counts rollouts by the verifier, or the part of a sum, that gave them no score, and by kind:
    timeout, exception, invalid value, died, out of memory, or no score where it gave none. `rescored` counts rollouts
    that were given to another child because one died at them.

    Raises ValueError where the verifier cannot be loaded.
    """

    def __init__(
        self,
        verifier: VerifierSpec,
        processes: int = 1,
        deadline: float = 5.0,
        memory_bytes: int | None = None,
        start_timeout: float = START_S,
        recycle: int = RECYCLE,
    ) -> None:
        self.failures: Counter[tuple[str, str]] = Counter()
        self.rescored = 0
        self._verifier = verifier
        self._processes = processes
        self._limits = Limits(deadline, start_timeout, memory_bytes, recycle)
        self._takes: Takes = "rollout"
        self._children: list[ScoringProcess] = []  # as many as `processes` have work; any others are their heirs
        self._todo: deque[Job] = deque()
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
        encoded = [encode(rollout) for rollout in rollouts]
        if self._takes == "group":
            jobs = [Job(tuple(keys), encoded)]
        else:
            jobs = [Job((key,), [each]) for key, each in zip(keys, encoded, strict=True)]
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

    def _start_child(self) -> ScoringProcess:
        return ScoringProcess(self._verifier, self._limits)

    @property
    def _at_work(self) -> list[ScoringProcess]:
        return self._children[: self._processes]

    def _dispatch(self) -> None:
        while self._todo and len(self._children) < self._processes:
            self._children.append(self._start_child())
        takers = [child for child in self._at_work if child.takes_more]
        while self._todo and takers:
            taker = min(takers, key=lambda child: len(child.jobs))
            taker.give(self._next_job())
            if not taker.takes_more:
                takers.remove(taker)
        for child in self._children:
            child.flush()

    def _next_job(self) -> Job:
        """The next of what there is to do; for a verifier that takes batches, as much of it as makes one. A job that is
        tried again stays as it was, lest what is new in it dies with it."""
        job = self._todo.popleft()
        if self._takes == "batch" and not job.again:
            while self._todo and not self._todo[0].again and len(job.keys) + len(self._todo[0].keys) <= BATCH:
                job += self._todo.popleft()
        return job

    def _attend(self) -> None:
        """Sleep until there is something to do; take what the children replied; end those that are late."""
        # Nobody waits for this thread while all have work, and to look at each reply as it comes would cost more than
        # a quick verifier does.
        time.sleep(min([PAUSE, *(child.work_ahead / 2 for child in self._at_work)]))
        # A child is late if its time was up before the look at its socket that found nothing: a reply that came
        # while this thread was not scheduled still counts.
        now = time.monotonic()
        self._start_heirs(now)
        ready = self._poll(now)
        for child in list(self._children):
            try:
                if child.socket.fileno() in ready:
                    self._take_replies(child)
                if child.expires <= now:
                    raise child.late()
            except ProcessFailure as failure:
                self._remove(child, failure)

    def _start_heirs(self, now: float) -> None:
        """Start the successors of children that will probably be gone soon, to be ready by then."""
        for child in self._at_work:
            if child.heir_due <= now:
                child.heir_due = math.inf
                if len(self._children) < 2 * self._processes:
                    self._children.append(self._start_child())

    def _poll(self, now: float) -> set[int]:
        """The descriptors that are ready, when there is one or a child's time is up."""
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        for child in self._children:
            poll.register(child.socket, select.POLLIN | (select.POLLOUT if child.has_unsent else 0))
        until = min((min(child.expires, child.heir_due) for child in self._children), default=math.inf)
        timeout = None if until == math.inf else max(0, (until - now) * 1000)
        ready = {descriptor for descriptor, _ in poll.poll(timeout)}
        if self._wake in ready:
            os.eventfd_read(self._wake)
        return ready

    def _take_replies(self, child: ScoringProcess) -> None:
        verdicts: list[Verdict] = []
        try:
            for some in child.verdicts():
                verdicts += some
        finally:  # what it said before it failed counts
            self._finish(verdicts)
        if child.is_spent:
            child.kill()
            self._children.remove(child)
        if not self._started and all(child.ready for child in self._children):
            with self._changed:
                self._takes = child.takes
                self._started = True
                self._changed.notify_all()

    def _remove(self, child: ScoringProcess, failure: ProcessFailure) -> None:
        """End a child, charge the job it was at unless that may be tried again, and put the rest back; _dispatch starts
        another when there is work."""
        child.kill()
        self._children.remove(child)
        if not self._started:
            raise ValueError(str(failure))
        if failure.perhaps_killed and child.jobs and not child.jobs[0].again:
            child.jobs[0].again = True
            self.rescored += len(child.jobs[0].keys)
        else:
            self._finish(child.charge(failure))
        self._todo.extendleft(reversed(child.jobs))

    def _finish(self, verdicts: Sequence[Verdict]) -> None:
        with self._changed:
            for key, score, failures in verdicts:
                self._scores[key] = score
                self._unscored.remove(key)
                for verifier, kind in failures.items():
                    self.failures[verifier, kind] += 1
            if not self._unscored:
                self._changed.notify_all()
