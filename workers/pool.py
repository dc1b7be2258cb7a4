"""The workers of a run: Ray actors, where they are placed, what they are given to do, and what happens when they die,
or their nodes do.

A call is independent of the worker that carries it out, so a dead worker's call simply goes to another. The pool holds
no state of the run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    ActorUnschedulableError,
    ObjectLostError,
    OutOfMemoryError,
    RayTaskError,
    RuntimeEnvSetupError,
    WorkerCrashedError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from es_engine.config import SimulatedEngineConfig
from workers.actor import Worker, WorkerSetup
from workers.calls import Call, Notice, Round
from workers.cluster import (
    FULL,
    ask_autoscaler,
    connect,
    credentials,
    environment,
    found_no_room,
    living_nodes,
)
from workers.divergence import Diverged, NotFinite
from workers.ground import Ground
from workers.places import Nodes, Place
from workers.simulated_engine import SimulatedWorkers

if TYPE_CHECKING:
    from workers.canary import CanaryReport

TICK_S = 1.0
NODES_S = 5.0
"""How often the cluster is asked for its nodes."""
ROOM_S = 600.0
"""How long room in Ray's object store is waited for."""
NOTICE_S = 60.0
NOTICES = 8  # at once: a screen, not hundreds of lines
DEATHS = (
    ActorDiedError,
    ActorUnavailableError,
    ActorUnschedulableError,
    ObjectLostError,
    OutOfMemoryError,  # of a worker that Ray killed before its node's memory was full
    RuntimeEnvSetupError,
    WorkerCrashedError,
)
OF_A_MACHINE = (MemoryError, OSError, RuntimeError)
"""What a broken machine makes a worker raise, as others do: a GPU's errors, a lost tensor-parallel rank's and those of
NCCL are RuntimeErrors."""


@dataclass(slots=True)
class _Seat:
    """A worker's place, its present actor and the setup that this serves; it may be busy with call `number` of a round,
    perhaps one that is over."""

    index: int
    place: Place
    actor: Any = None
    setup: Any = None
    task: Any = None
    round: Round | None = None
    number: int = -1
    since: float = 0.0
    noticed: float = 0.0
    failed_starts: int = 0

    @property
    def busy_with(self) -> str:
        """What it does, for people."""
        return "its start" if self.call is None else self.call.name

    @property
    def call(self) -> Call | None:
        """The call that it is busy with."""
        return None if self.round is None else self.round.calls[self.number]

    def is_free(self) -> None:
        """Note that it has nothing to do."""
        self.task = self.round = None


class Pool:
    """Workers on the nodes that there are. One that dies or hangs is replaced where there is room, more begin when a
    node joins, and fewer go on when one is lost, as far as `pool.workers` allows."""

    def __init__(self, setup: WorkerSetup, notify: Callable[[str], None] = print) -> None:
        """Connects to Ray (or starts it) and starts the workers.

        Raises ValueError if the cluster cannot hold the workers, or if one of them cannot take part. With bounds, a
        cluster that was there before is given `pool.node_timeout_s` to get nodes for the fewest.
        """
        self.restarts = 0
        self.speculative = 0
        self.retries = 0
        self.canaries: dict[int, CanaryReport] = {}
        self._notify = notify
        self._config = setup.config
        self._pool = setup.config.pool
        self._round: Round | None = None
        self._seats: list[_Seat] = []
        self._shared: dict[tuple[str, int], Any] = {}
        self._short_since: float | None = None
        self._asked_for: list[dict[str, float]] = []
        self._owns_ray = connect(self._pool.address)
        try:
            self._setup = self.put(setup)
            nodes = living_nodes()
            self._ground = Ground(self._config, nodes)
            self._ground.check_room(nodes, nodes_may_come=not self._owns_ray)
            self._asked_for = self._ground.bundles
            if self._asked_for:
                ask_autoscaler(self._asked_for)
            self._looked = time.monotonic()
            self._fill(nodes)
            self.workers = self._wait_for_start()
        except BaseException:
            self.close()
            raise

    @property
    def size(self) -> int:
        """The number of workers at the moment, at least 1."""
        return max(1, len(self._seats))

    def states(self) -> dict[str, int]:
        """How many workers do what at this moment; may be asked from another thread."""
        states = {"busy": 0, "idle": 0, "starting": 0}
        for seat in list(self._seats):
            states["busy" if seat.round is not None else "idle" if seat.task is None else "starting"] += 1
        return states

    def put(self, value: Any) -> Any:
        """Share a value with all workers; pass what comes back as a call's argument. Waits while there is no room for
        it; raises ValueError if there is none for long."""
        return self._once_there_is_room(lambda: ray.put(value))

    def run(self, calls: Sequence[Call]) -> list[Any]:
        """Carry out the calls on whichever workers are free; the results, in the order of the calls.

        An exception in a call is raised here; of those that a broken machine may cause, the second in the same call.
        Raises ValueError if a call outlives more than `pool.retries` workers, if there are too few of them for longer
        than `pool.node_timeout_s`, or if Ray's object store is full for long; Diverged, which is one, if no worker has
        finite numbers to reply to a call.
        """
        return self.run_until(calls, lambda done: len(done) == len(calls))

    def run_until(self, calls: Sequence[Call], enough: Callable[[Collection[int]], bool]) -> list[Any]:
        """The same, but once the calls that are done (their numbers) are `enough`, the others are waited for
        `pool.straggler_s` and no longer; the results of those that are given up are None."""
        todo = self._round = Round(calls)
        enough_since = math.inf
        try:
            while len(todo.results) < len(calls):
                self._give_work(todo)
                for seat in self._done([seat for seat in self._seats if seat.task is not None]):
                    self._take_result(seat)
                self._watch()
                if enough(todo.results.keys()):
                    enough_since = min(enough_since, time.monotonic())
                    if time.monotonic() - enough_since > self._pool.straggler_s:
                        self._tell_given_up(todo)
                        break
            return [todo.results.pop(number, None) for number in range(len(calls))]
        finally:
            self._round = None

    def count_anew(self) -> None:
        """Count restarts, speculative calls and retries from zero, as of a run that begins."""
        self.restarts = self.speculative = self.retries = 0

    def assign(self, setup: WorkerSetup) -> None:
        """Have the workers, and those that will replace them, serve another run, of the same engine and pool.

        Raises ValueError if one of them cannot.
        """
        self._setup = self.put(setup)
        for seat in self._seats:
            if seat.task is None:
                self._assign(seat)
        self.workers = self._wait_for_start()

    def close(self) -> None:
        """End the workers, and Ray if it was started here."""
        for seat in self._seats:
            if seat.actor is not None:
                ray.kill(seat.actor)
        if self._asked_for:
            ask_autoscaler([])
        if self._owns_ray:
            ray.shutdown()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- actors

    def _start(self, seat: _Seat) -> None:
        seat.actor, seat.setup = self._process(seat), self._setup
        if seat.place.shared is None:
            self._send(seat, "start")
        else:  # in a process that may be older than the setup
            self._send(seat, "start", self._setup)

    def _assign(self, seat: _Seat) -> None:
        self._send(seat, "assign", self._setup)
        seat.setup = self._setup

    def _process(self, seat: _Seat) -> Any:
        """A new process for a worker or, where several share one, the one its fellows have moved to."""
        place = seat.place
        options: dict[str, Any] = {
            "num_cpus": self._pool.threads if place.shared is None else 0,
            "num_gpus": place.gpus,
            "max_restarts": 0,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(place.node, soft=False),
            "runtime_env": {"env_vars": environment(self._pool.threads)},
        }
        if place.shared is None:
            return ray.remote(Worker).options(**options).remote(self._setup, seat.index, place.cores, credentials())
        assert isinstance(self._config.engine, SimulatedEngineConfig)
        key = (place.node, place.shared)
        if self._shared.get(key) is seat.actor:  # none yet, or the one that died under this worker
            threads = self._config.engine.workers_per_process
            processes = ray.remote(SimulatedWorkers).options(**options, max_concurrency=threads)
            self._shared[key] = processes.remote()
        return self._shared[key]

    def _send(self, seat: _Seat, method: str, *arguments: Any) -> None:
        """Have a worker that does nothing begin with something."""
        if seat.place.shared is None:
            remote = partial(getattr(seat.actor, method).remote, *arguments)
        else:
            remote = partial(seat.actor.carry_out.remote, seat.index, method, *arguments)
        seat.task = self._once_there_is_room(remote)  # Ray stores large arguments
        seat.since = seat.noticed = time.monotonic()

    def _wait_for_start(self) -> list[dict[str, Any]]:
        """Wait until every worker is ready for the present setup; what each says of itself."""
        described: dict[int, dict[str, Any]] = {}
        while len(self._seats) < self._ground.fewest or any(seat.index not in described for seat in self._seats):
            for seat in self._done([seat for seat in self._seats if seat.index not in described]):
                if seat.round is not None:  # a call that nobody waits for any more
                    self._take_result(seat)
                elif (reply := self._reply(seat)) is not None:
                    (report,) = reply
                    self._has_started(seat, report)
                    if seat.setup is self._setup:
                        described[seat.index] = report
            for seat in self._seats:  # done with such a call, or begun for the setup before
                if seat.task is None and seat.index not in described:
                    self._assign(seat)
            self._watch()
        return [described[seat.index] for seat in self._seats if seat.index in described]

    # --- calls

    def _give_work(self, todo: Round) -> None:
        idle = [seat for seat in self._seats if seat.task is None]
        if not idle:
            return
        late_before = time.monotonic() - todo.late_after
        busy = [seat for seat in self._seats if seat.round is todo]
        late = [seat for seat in busy if seat.since < late_before and seat.number not in todo.repeated]
        on_time = {seat.index for seat in (*idle, *busy) if seat.task is None or seat.since >= late_before}
        for seat in idle:
            number = todo.take(seat.index, on_time)
            if number is None and late:
                slowest = min(late, key=lambda other: other.since)
                late.remove(slowest)
                number = slowest.number
                todo.repeated.add(number)
                self.speculative += 1
            if number is not None:
                call = todo.calls[number]
                self._send(seat, call.method, *call.arguments)
                seat.round, seat.number = todo, number

    def _done(self, seats: Sequence[_Seat]) -> list[_Seat]:
        """Those of the seats whose task is done, after a tick at most."""
        if not seats:
            time.sleep(TICK_S)
            return []
        done, _ = ray.wait([seat.task for seat in seats], num_returns=1, timeout=TICK_S)
        return [seat for seat in seats if seat.task in done]

    def _take_result(self, seat: _Seat) -> None:
        took, starting = time.monotonic() - seat.since, seat.round is None
        if (reply := self._reply(seat)) is None:
            return
        todo, (result,) = seat.round, reply
        if todo is not None and todo is self._round and seat.number not in todo.results:
            if (fault := todo.calls[seat.number].fault(result)) is not None:
                self._refuse(seat, todo, fault)
                return
            todo.results[seat.number] = result
            todo.took.append(took)
        if starting:
            self._has_started(seat, result)
        else:
            seat.is_free()

    def _refuse(self, seat: _Seat, todo: Round, fault: str) -> None:
        """Replace a worker for a bad reply to a call, unless those before it replied alike."""
        call = todo.calls[seat.number]
        if isinstance(fault, NotFinite) and (seat.number in todo.not_finite or not self._pool.retries):
            seat.is_free()
            raise Diverged(f"{fault} in every reply to {call.name}")
        if isinstance(fault, NotFinite):
            todo.not_finite.add(seat.number)
        self._lose(seat, f"a bad reply to {call.name}: {fault}")

    def _has_started(self, seat: _Seat, report: dict[str, Any]) -> None:
        """Note that a worker is ready, and what its canary found."""
        seat.is_free()
        seat.failed_starts = 0
        self._ground.prove(seat.place.node)
        if (canary := report.get("canary")) is not None:
            self.canaries[seat.index] = canary

    def _reply(self, seat: _Seat) -> tuple[Any] | None:
        """What came of a worker's finished task; None if it died instead or its answer found no room, and then all that
        follows is under way."""
        try:
            return (ray.get(seat.task),)
        except DEATHS as death:
            self._lose(seat, _last_words(death))
            return None
        except (RayTaskError, *FULL) as error:
            if found_no_room(error):
                self._leave_for_later(seat)
                return None
            if self._does_without(seat, error.cause):
                return None
            if isinstance(error.cause, ValueError):
                raise ValueError(str(error.cause)) from error
            raise

    def _does_without(self, seat: _Seat, cause: Exception) -> bool:
        """Replace a worker, or do without its place, for what it raised; False if it would be in vain, or if it was to
        begin with the others."""
        if self._round is None and seat.round is None:
            return False
        if seat.round is not None and (seat.round is not self._round or seat.number in seat.round.results):
            again = True  # nobody waits for its answer
        elif seat.round is not None:
            again = isinstance(cause, OF_A_MACHINE) and self._pool.retries > 0 and seat.number not in seat.round.broke
            seat.round.broke.add(seat.number)
        else:  # what the worker before it held, such as a GPU's memory, may not be free yet
            again = self._ground.is_proven(seat.place.node) and seat.failed_starts < self._pool.retries
        if again:
            self._lose(seat, _in_a_line(cause))
            return True
        return seat.round is None and self._give_up(seat, _in_a_line(cause))

    def _lose(self, seat: _Seat, reason: str) -> None:
        """Go on without a worker's process: another is started where there is room, and its call goes to others."""
        self.restarts += 1
        ray.kill(seat.actor)
        todo, number = seat.round, seat.number
        if todo is None:
            seat.failed_starts += 1
        seat.is_free()
        if seat.failed_starts > self._pool.retries:
            if not self._give_up(seat, reason):
                raise ValueError(f"worker {seat.index} died {seat.failed_starts} times while starting ({reason})")
        elif (place := self._place_for(seat)) is None:
            self._seats.remove(seat)
            self._notify(Notice(f"worker {seat.index} is lost ({reason}); there is no room for another", seat.index))
        else:
            self._notify(Notice(f"worker {seat.index} is replaced ({reason})", seat.index))
            if place != seat.place:
                seat.place, seat.actor = place, None
            self._start(seat)
        if todo is not None and todo is self._round and number not in todo.results:
            self._retry(seat, todo, number, reason)

    def _retry(self, seat: _Seat, todo: Round, number: int, reason: str) -> None:
        """Have the call that a seat's worker died of given out again."""
        todo.deaths[number] += 1
        if todo.deaths[number] > self._pool.retries:
            raise ValueError(
                f"{todo.calls[number].name} cost {todo.deaths[number]} workers, the last by {reason}; "
                "pool.retries allows no more; `es-engine resume RUN` tries it again"
            )
        self._give_again(seat, todo, number)

    def _give_again(self, seat: _Seat, todo: Round, number: int, reason: str = "") -> None:
        """Put a call back that a seat's worker was given, unless another is at it or it is done."""
        still = any(other.round is todo and other.number == number for other in self._seats)
        if number not in todo.results and not still:
            self.retries += 1
            call = todo.calls[number]
            self._notify(Notice(f"{call.name} is given out again{reason}", seat.index, call))
            todo.repeated.discard(number)
            todo.put_back(number)

    # --- room in the object store

    def _once_there_is_room(self, store: Callable[[], Any]) -> Any:
        """Store something in Ray as soon as it can be; raises ValueError if it cannot for long."""
        since: float | None = None
        while True:
            try:
                return store()
            except FULL as error:
                now = time.monotonic()
                if since is None:
                    since = now
                    self._notify(f"Ray's object store is full; room in it is waited for up to {ROOM_S:.0f} s")
                elif now - since > ROOM_S:
                    raise _no_room("the driver's node") from error
                time.sleep(TICK_S)

    def _leave_for_later(self, seat: _Seat) -> None:
        """Go on with a worker whose answer found no room, and have its call given out again; raises ValueError if there
        is no room for long."""
        todo, number = seat.round, seat.number
        if todo is None:
            self._lose(seat, "Ray's object store is full")
            return
        seat.is_free()
        if todo is not self._round or number in todo.results:
            return
        now = time.monotonic()
        if now - todo.homeless.setdefault(number, now) > ROOM_S:
            raise _no_room(f"node {seat.place.node[:8]}")
        self._give_again(seat, todo, number, " (Ray's object store is full)")
        time.sleep(TICK_S)  # there is no more room until something else is done

    def _tell_given_up(self, todo: Round) -> None:
        names = [call.name for number, call in enumerate(todo.calls) if number not in todo.results]
        self._notify(f"going on without {len(names)} of {len(todo.calls)} calls: {', '.join(names[:NOTICES])}")

    # --- nodes

    def _place_for(self, seat: _Seat) -> Place | None:
        taken = [other.place for other in self._seats if other is not seat]
        return self._ground.place_for(seat.place, living_nodes(), taken, failed=seat.failed_starts > 0)

    def _give_up(self, seat: _Seat, reason: str) -> bool:
        """Do without the place where a worker cannot start or, where none ever did, without the node; False if the run
        cannot."""
        node = seat.place.node
        if self._ground.is_proven(node) and len(self._seats) > self._ground.fewest:
            self._ground.give_up(seat.place)
            notice = f"worker {seat.index} is given up ({reason})"
        elif self._ground.others_than(node, living_nodes()):
            self._ground.bar(node)
            notice = f"node {node[:8]} is given no more workers ({reason})"
        else:
            return False
        self._seats.remove(seat)
        ray.kill(seat.actor)
        self._notify(Notice(notice, seat.index))
        return True

    def _fill(self, nodes: Nodes) -> int:
        """Have workers begin where there is room, as many as there may be; how many."""
        numbers = (index for index in count() if all(seat.index != index for seat in self._seats))
        places = self._ground.room(nodes, [seat.place for seat in self._seats])
        for place in places:
            self._seats.append(_Seat(next(numbers), place))
            self._start(self._seats[-1])
        return len(places)

    def _look_for_nodes(self) -> None:
        """Take leave of workers whose nodes are gone, and use the nodes that are new."""
        nodes = living_nodes()
        for seat in [seat for seat in self._seats if seat.place.node not in nodes]:
            self._lose(seat, f"node {seat.place.node[:8]} is gone")
        if joined := self._fill(nodes):
            self._notify(f"{joined} workers more, {len(self._seats)} now: there is room for them")

    def _check_strength(self, now: float) -> None:
        if len(self._seats) >= self._ground.fewest:
            self._short_since = None
            return
        limit = self._pool.node_timeout_s
        there_are = f"{len(self._seats)} of at least {self._ground.fewest} workers have room"
        if self._short_since is None:
            self._short_since = now
            self._notify(f"{there_are}; nodes are waited for up to {limit:.0f} s")
        elif now - self._short_since > limit:
            raise ValueError(
                f"pool.workers: {there_are}, and no node came in {limit:.0f} s; "
                "once there are nodes, begin again, or `es-engine resume RUN` goes on from here"
            )

    def _watch(self) -> None:
        """Say what is being waited for, replace workers that exceed their time, and follow what nodes there are."""
        now = time.monotonic()
        overdue = []
        for seat in list(self._seats):
            if seat.task is None:
                continue
            limit = self._pool.start_timeout_s if seat.round is None else self._pool.chunk_timeout_s
            if now - seat.since > limit:
                self._lose(seat, f"{seat.busy_with} took more than {limit:.0f} s")
            elif now - seat.noticed > NOTICE_S:
                seat.noticed = now
                text = f"waiting {now - seat.since:.0f} s for {seat.busy_with} on worker {seat.index}"
                overdue.append(Notice(text, seat.index, seat.call))
        for notice in overdue[:NOTICES]:
            self._notify(notice)
        if len(overdue) > NOTICES:
            self._notify(f"and as long for {len(overdue) - NOTICES} other workers")
        if now - self._looked > NODES_S:
            self._looked = now
            self._look_for_nodes()
        self._check_strength(now)


def _no_room(where: str) -> ValueError:
    return ValueError(
        f"Ray's object store on {where} and the disk that it spills to have been full for {ROOM_S:.0f} s; make room "
        "under Ray's temporary folder (/tmp/ray), or start Ray with more --object-store-memory, and `es-engine resume "
        "RUN` goes on from here"
    )


def _last_words(death: Exception) -> str:
    """What killed a worker: Ray says it last, after what the worker was or the traceback of its start; but advice
    follows where a node's memory was full, and whether the worker had ever run."""
    lines = [line for line in str(death).strip().splitlines() if not line.startswith("The actor never ran")]
    return ": ".join([type(death).__name__, *(lines[:1] if isinstance(death, OutOfMemoryError) else lines[-1:])])


def _in_a_line(error: Exception) -> str:
    """What an exception says first; a traceback or a list of hints may follow."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
