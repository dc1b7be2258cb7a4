"""The workers of a run: Ray actors, where they are placed, what they are given to do, and what happens when they die.

A call is independent of the worker that carries it out, so a dead worker's call simply goes to another. The pool holds
no state of the run.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectLostError, RayTaskError, WorkerCrashedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from es_engine.config import Config, SimulatedEngineConfig
from workers.actor import Worker, WorkerSetup
from workers.simulated_engine import SimulatedWorkers

if TYPE_CHECKING:
    from workers.canary import CanaryReport

TICK_S = 1.0
NOTICE_S = 60.0
NOTICES = 8  # at once: a screen, not hundreds of lines
KNOCK_S = 10.0
DEATHS = (ActorDiedError, ActorUnavailableError, ObjectLostError, WorkerCrashedError)
PASSED_ON = ("ES_ENGINE_CACHE", "HF_HOME", "HF_HUB_OFFLINE", "HF_TOKEN", "VLLM_LOGGING_LEVEL")


@dataclass(frozen=True, slots=True)
class Call:
    """A method of `Worker` to be run once by any worker; `name` is for people, `preferred` the worker it suits best,
    `chunk` the number of the chunk that it is about."""

    name: str
    method: str
    arguments: tuple[Any, ...]
    preferred: int | None = None
    chunk: int | None = None


class Notice(str):
    """A sentence about the pool for people; `about` says for programs which worker, call and chunk it is about."""

    about: Mapping[str, int | str]

    def __new__(cls, text: str, worker: int, call: Call | None = None) -> Notice:
        notice = super().__new__(cls, text)
        named = {} if call is None else {"call": call.name, "chunk": call.chunk}
        notice.about = {"worker": worker, **{name: value for name, value in named.items() if value is not None}}
        return notice


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker runs: a node and, on CPU, some of the cores its processes may use.

    Workers with the same number `shared` are threads of one process and take no CPU; None is a process of its own.
    """

    node: str
    cores: tuple[int, ...] | None = None
    gpus: int = 0
    shared: int | None = None


@dataclass(slots=True)
class _Seat:
    """A worker's place, its present actor and the setup that this serves; `call` is the number of the call it is busy
    with."""

    index: int
    place: Place
    actor: Any = None
    setup: Any = None
    task: Any = None
    call: int | None = None
    since: float = 0.0
    noticed: float = 0.0
    failed_starts: int = 0


class _Round:
    """The calls of one `run` and how far they are; `waiting` are the numbers of those to be given out, in their order,
    by the worker they prefer."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = calls
        self.waiting: defaultdict[int | None, deque[int]] = defaultdict(deque)
        self.results: dict[int, Any] = {}
        self.deaths: Counter[int] = Counter()
        for number, call in enumerate(calls):
            self.waiting[call.preferred].append(number)

    def take(self, worker: int, alive: AbstractSet[int | None]) -> int | None:
        """Take out the first waiting call that prefers this worker, or else that no living worker is preferred for."""
        candidates = [worker] if worker in self.waiting else [other for other in self.waiting if other not in alive]
        if not candidates:
            return None
        preferred = min(candidates, key=lambda other: self.waiting[other][0])
        number = self.waiting[preferred].popleft()
        if not self.waiting[preferred]:
            del self.waiting[preferred]
        return number

    def put_back(self, number: int) -> None:
        """Have a call given out again, before the others that prefer the same worker."""
        self.waiting[self.calls[number].preferred].appendleft(number)


class Pool:
    """A fixed number of workers, each replaced when it dies or hangs."""

    def __init__(self, setup: WorkerSetup, notify: Callable[[str], None] = print) -> None:
        """Connects to Ray (or starts it) and starts the workers.

        Raises ValueError if the cluster cannot hold the workers, or if one of them cannot take part.
        """
        self.restarts = 0
        self.retries = 0
        self.canaries: dict[int, CanaryReport] = {}
        self._config = setup.config.pool
        self._notify = notify
        self._owns_ray = connect(self._config.address)
        try:
            self._threads = self._config.threads
            self._setup = ray.put(setup)
            self._shared: dict[int, Any] = {}
            self._seats = [_Seat(index, place) for index, place in enumerate(plan_places(setup.config))]
            for seat in self._seats:
                self._start(seat)
            self.workers = self._wait_for_start()
        except BaseException:
            self.close()
            raise

    @property
    def size(self) -> int:
        """The number of workers."""
        return len(self._seats)

    def states(self) -> dict[str, int]:
        """How many workers do what at this moment; may be asked from another thread."""
        states = {"busy": 0, "idle": 0, "starting": 0}
        for seat in self._seats:
            states["busy" if seat.call is not None else "idle" if seat.task is None else "starting"] += 1
        return states

    def put(self, value: Any) -> Any:
        """Share a value with all workers; pass what comes back as a call's argument."""
        return ray.put(value)

    def run(self, calls: Sequence[Call]) -> list[Any]:
        """Carry out the calls on whichever workers are free; the results, in the order of the calls.

        An exception in a call is raised here. Raises RuntimeError if a call outlives more than `pool.retries` workers.
        """
        todo = _Round(calls)
        while len(todo.results) < len(calls):
            self._give_work(todo)
            tasks = [seat.task for seat in self._seats if seat.task is not None]
            done, _ = ray.wait(tasks, num_returns=1, timeout=TICK_S)
            for seat in [seat for seat in self._seats if seat.task in done]:
                self._take_result(seat, todo)
            self._watch(todo)
        return [todo.results[number] for number in range(len(calls))]

    def assign(self, setup: WorkerSetup) -> None:
        """Have the workers, and those that will replace them, serve another run, of the same engine and pool.

        Raises ValueError if one of them cannot.
        """
        assert all(seat.call is None for seat in self._seats), "a call is still being carried out"
        self._setup = ray.put(setup)
        for seat in self._seats:
            if seat.task is None:
                self._assign(seat)
        self.workers = self._wait_for_start()

    def close(self) -> None:
        """End the workers, and Ray if it was started here."""
        for seat in getattr(self, "_seats", []):
            if seat.actor is not None:
                ray.kill(seat.actor)
        if self._owns_ray:
            ray.shutdown()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, seat: _Seat) -> None:
        seat.actor, seat.setup = self._process(seat), self._setup
        if seat.place.shared is None:
            self._send(seat, "start")
        else:  # in a process that may be older than the setup
            self._send(seat, "start", self._setup)
        seat.call = None

    def _assign(self, seat: _Seat) -> None:
        self._send(seat, "assign", self._setup)
        seat.setup = self._setup

    def _process(self, seat: _Seat) -> Any:
        """A new process for a worker or, where several share one, the one its fellows have moved to."""
        place = seat.place
        options: dict[str, Any] = {
            "num_cpus": self._threads if place.shared is None else 0,
            "num_gpus": place.gpus,
            "max_restarts": 0,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(place.node, soft=False),
            "runtime_env": {"env_vars": _environment(self._threads)},
        }
        if place.shared is None:
            return ray.remote(Worker).options(**options).remote(self._setup, seat.index, place.cores)
        if self._shared.get(place.shared) is seat.actor:  # none yet, or the one that died under this worker
            threads = sum(other.place.shared == place.shared for other in self._seats)
            processes = ray.remote(SimulatedWorkers).options(**options, max_concurrency=threads)
            self._shared[place.shared] = processes.remote()
        return self._shared[place.shared]

    def _send(self, seat: _Seat, method: str, *arguments: Any) -> None:
        """Have a worker that does nothing begin with something."""
        if seat.place.shared is None:
            seat.task = getattr(seat.actor, method).remote(*arguments)
        else:
            seat.task = seat.actor.carry_out.remote(seat.index, method, *arguments)
        seat.since = seat.noticed = time.monotonic()

    def _wait_for_start(self) -> list[dict[str, Any]]:
        """Wait until every worker is ready for the present setup; what each says of itself."""
        described: dict[int, dict[str, Any]] = {}
        while len(described) < len(self._seats):
            starting = [seat for seat in self._seats if seat.index not in described]
            done, _ = ray.wait([seat.task for seat in starting], num_returns=1, timeout=TICK_S)
            for seat in [seat for seat in starting if seat.task in done]:
                report = self._outcome(seat)
                if report is None:
                    continue
                self._has_started(seat, report)
                if seat.setup is self._setup:
                    described[seat.index] = report
                else:  # a replacement, begun for the setup before
                    self._assign(seat)
            self._watch(None)
        return [described[index] for index in range(len(self._seats))]

    def _give_work(self, todo: _Round) -> None:
        if not todo.waiting:
            return
        alive = {seat.index for seat in self._seats if seat.call is not None or seat.task is None}
        for seat in self._seats:
            if seat.task is None and (number := todo.take(seat.index, alive)) is not None:
                call = todo.calls[number]
                self._send(seat, call.method, *call.arguments)
                seat.call = number

    def _take_result(self, seat: _Seat, todo: _Round) -> None:
        number = seat.call
        result = self._outcome(seat)
        if number is None:  # a replacement has started
            if result is not None:
                self._has_started(seat, result)
        elif seat.call is None:  # the worker died and was replaced
            self._retry(seat, number, todo)
        else:
            todo.results[number] = result
            seat.task = seat.call = None

    def _has_started(self, seat: _Seat, report: dict[str, Any]) -> None:
        seat.task, seat.failed_starts = None, 0
        if (canary := report.get("canary")) is not None:
            self.canaries[seat.index] = canary

    def _outcome(self, seat: _Seat) -> Any:
        """The result of a worker's finished task; None if it died instead, and then a replacement is under way."""
        try:
            return ray.get(seat.task)
        except DEATHS as death:
            self._replace(seat, type(death).__name__)
            return None
        except RayTaskError as error:
            if isinstance(error.cause, ValueError):
                raise ValueError(str(error.cause)) from error
            raise

    def _replace(self, seat: _Seat, reason: str) -> None:
        if seat.call is None:
            seat.failed_starts += 1
            if seat.failed_starts > self._config.retries:
                raise RuntimeError(f"worker {seat.index} died {seat.failed_starts} times while starting ({reason})")
        self.restarts += 1
        self._notify(Notice(f"worker {seat.index} is replaced ({reason})", seat.index))
        ray.kill(seat.actor)
        self._start(seat)

    def _retry(self, seat: _Seat, number: int, todo: _Round) -> None:
        """Have the call that a seat's worker died of given out again."""
        todo.deaths[number] += 1
        if todo.deaths[number] > self._config.retries:
            raise RuntimeError(
                f"{todo.calls[number].name} cost {todo.deaths[number]} workers; pool.retries allows no more"
            )
        self.retries += 1
        call = todo.calls[number]
        self._notify(Notice(f"{call.name} is given out again", seat.index, call))
        todo.put_back(number)

    def _watch(self, todo: _Round | None) -> None:
        """Say what is being waited for, and replace workers that exceed their time."""
        now = time.monotonic()
        overdue = []
        for seat in self._seats:
            if seat.task is None:
                continue
            number = seat.call
            call = None if todo is None or number is None else todo.calls[number]
            what = "its start" if call is None else call.name
            limit = self._config.start_timeout_s if number is None else self._config.chunk_timeout_s
            if now - seat.since > limit:
                self._replace(seat, f"{what} took more than {limit:.0f} s")
                if todo is not None and number is not None:
                    self._retry(seat, number, todo)
            elif now - seat.noticed > NOTICE_S:
                seat.noticed = now
                text = f"waiting {now - seat.since:.0f} s for {what} on worker {seat.index}"
                overdue.append(Notice(text, seat.index, call))
        for notice in overdue[:NOTICES]:
            self._notify(notice)
        if len(overdue) > NOTICES:
            self._notify(f"and as long for {len(overdue) - NOTICES} other workers")


def connect(address: str | None) -> bool:
    """Join the cluster at `address`, or start a local one; True if one was started.

    Raises ValueError for a bad address.
    """
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    on_sigterm = signal.getsignal(signal.SIGTERM)
    _initialise(address)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray takes it for itself, and dies of it with a stack trace
    return address is None


def _initialise(address: str | None) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        ray.init(address="local", include_dashboard=False, **quiet)
        return
    try:
        _knock(address)
        ray.init(address=address, **quiet)
    except OSError as error:  # ConnectionError and time-outs
        raise ValueError(
            f"pool.address: no Ray cluster answers at {address}; start one or use null for a local one"
        ) from error


def _knock(address: str) -> None:
    """Raises OSError if nobody listens at host:port, which Ray itself would only find out after minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon:
        socket.create_connection((host, int(port)), timeout=KNOCK_S).close()


def plan_places(config: Config) -> list[Place]:
    """A place for every worker, node by node. Raises ValueError if the cluster has too few CPUs or GPUs."""
    pool = config.pool
    nodes = sorted((node["NodeID"], node["Resources"]) for node in ray.nodes() if node["Alive"])
    if isinstance(config.engine, SimulatedEngineConfig):
        cpus = sum(int(resources.get("CPU", 0)) for _, resources in nodes)
        workers = max(1, cpus // pool.threads) if pool.workers == "auto" else pool.workers
        return _shared_places([node for node, _ in nodes], workers, config.engine.workers_per_process)
    on_gpu = _uses_gpus(config) and any(resources.get("GPU", 0) >= 1 for _, resources in nodes)
    places = []
    for node, resources in nodes:
        by_cpu = int(resources.get("CPU", 0)) // pool.threads
        room = min(by_cpu, int(resources.get("GPU", 0)) // pool.tensor_parallel) if on_gpu else by_cpu
        for seat in range(room):
            cores = None if on_gpu else tuple(range(seat * pool.threads, (seat + 1) * pool.threads))
            places.append(Place(node, cores, pool.tensor_parallel if on_gpu else 0))
    wanted = max(1, len(places)) if pool.workers == "auto" else pool.workers
    if wanted > len(places):
        kind = f"{pool.tensor_parallel} GPU(s)" if on_gpu else f"{pool.threads} CPU(s)"
        raise ValueError(f"pool.workers: the cluster has room for {len(places)} workers of {kind} each, not {wanted}")
    return places[:wanted]


def _shared_places(nodes: Sequence[str], workers: int, per_process: int) -> list[Place]:
    """Places for workers that only sleep, dealt out evenly to as few processes as hold them."""
    processes = math.ceil(workers / per_process)
    return [Place(nodes[worker % processes % len(nodes)], shared=worker % processes) for worker in range(workers)]


def _uses_gpus(config: Config) -> bool:
    import torch

    return torch.version.cuda is not None and not (config.engine.kind == "hf" and config.engine.device == "cpu")


def _environment(threads: int) -> dict[str, str]:
    return {
        "OMP_NUM_THREADS": str(threads),
        # Spinning threads would take the cores from Ray's own processes.
        "OMP_WAIT_POLICY": "passive",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        **{name: os.environ[name] for name in PASSED_ON if name in os.environ},
    }
