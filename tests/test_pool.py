"""What the pool does with calls, deaths and time limits, on a cluster that is made up and a clock that only waiting
moves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from made_up_cluster import Behaviour, Cluster, name
from ray.exceptions import ActorDiedError, OutOfDiskError, OutOfMemoryError, RayTaskError, RuntimeEnvSetupError

from es_engine.config import PoolConfig, parse_config
from es_engine.config.pool import WorkerRangeConfig
from workers import cluster as clusters
from workers import pool as pools
from workers.calls import Call
from workers.divergence import Diverged, NotFinite
from workers.places import bundles
from workers.pool import Pool

DIED = "ActorDiedError: The actor died unexpectedly before finishing this task."


class Notices(list[str]):
    """What the pool told."""

    def __call__(self, text: str) -> None:
        self.append(text)


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Pool, Cluster, Notices]]:
    """Starts a pool whose workers behave as told."""

    def started(
        behave: Behaviour,
        engine: dict[str, Any] | None = None,
        nodes: Sequence[float] = (2.0, 2.0),
        joins_at: float = math.inf,
        **fields: Any,
    ) -> tuple[Pool, Cluster, Notices]:
        cluster, notices = Cluster(behave), Notices()
        cluster.at(joins_at, lambda: cluster.join(2))
        for module in (clusters, pools):
            monkeypatch.setattr(module, "ray", cluster)
        monkeypatch.setattr(pools, "time", SimpleNamespace(monotonic=lambda: cluster.now, sleep=cluster.sleep))
        monkeypatch.setattr(pools, "ask_autoscaler", cluster.requests.append)
        cluster.nodes_alive = {name(node): cpus for node, cpus in enumerate(nodes)}
        config = parse_config(
            {
                "name": "test",
                "model": {"source": "none"},
                "optimizer": {"lr": 1.0},
                "task": {},
                "engine": engine or {"kind": "hf", "device": "cpu"},
                "pool": {"workers": 2, **fields},
                "budget": {"generations": 1},
            }
        )
        setup: Any = SimpleNamespace(config=config)
        return Pool(setup, notices), cluster, notices

    return started


def well(process: int, method: str, arguments: tuple[Any, ...]) -> tuple[float, Any]:
    """Starts, and is assigned, in a second; a call's first argument is how long it takes, and its result the process
    that did it."""
    return (1.0, {}) if method in ("start", "assign") else (float(arguments[0]), process)


def call(seconds: float, preferred: int | None = None) -> Call:
    return Call(f"a call of {seconds} s", "evaluate", (seconds,), preferred)


def test_whoever_is_free_takes_the_next_call_and_results_come_in_order(start: Any) -> None:
    pool, cluster, _ = start(well)
    assert pool.run([call(5), call(1), call(1), call(1), call(4)]) == [0, 1, 1, 1, 1]
    assert cluster.now == 1 + 7
    assert pool.run([]) == []


def test_a_call_waits_for_the_living_worker_it_prefers(start: Any) -> None:
    pool, cluster, _ = start(well)
    assert pool.run([call(3, 1), call(3, 1), call(1, 0), call(1), call(1, 7)]) == [1, 1, 0, 0, 0]
    assert cluster.now == 1 + 6


def test_a_dead_workers_call_goes_to_another_that_need_not_wait_for_its_replacement(start: Any) -> None:
    def fragile(process: int, method: str, arguments: tuple[Any, ...]) -> tuple[float, Any]:
        if process == 1 and method != "start":
            return 2.0, ActorDiedError()
        return (100.0 if process == 2 else 1.0, {}) if method == "start" else (float(arguments[0]), process)

    pool, cluster, notices = start(fragile)
    assert pool.run([call(5, 0), call(5, 1)]) == [0, 0]
    assert cluster.now == 1 + 10
    assert pool.restarts == 1
    assert pool.retries == 1
    assert notices == [f"worker 1 is replaced ({DIED})", "a call of 5 s is given out again"]
    assert [notice.about for notice in notices] == [{"worker": 1}, {"worker": 1, "call": "a call of 5 s"}]
    assert pool.states() == {"busy": 0, "idle": 1, "starting": 1}


@pytest.mark.parametrize(
    ("death", "why"),
    [
        (OutOfMemoryError("the memory is nearly full\n\nRefer to the documentation"), "the memory is nearly full"),
        (RuntimeEnvSetupError("no such variable"), "no such variable"),
        (ActorDiedError(RayTaskError("__init__", "Traceback:\nImportError: x\n", OSError())), "ImportError: x"),
    ],
)
def test_a_worker_that_ray_ended_is_replaced_as_one_that_died(start: Any, death: Exception, why: str) -> None:
    def fragile(process: int, method: str, arguments: tuple[Any, ...]) -> tuple[float, Any]:
        seconds, result = well(process, method, arguments)
        return seconds, death if process == 1 and method != "start" else result

    pool, _, notices = start(fragile)
    assert pool.run([call(5, 0), call(5, 1)]) == [0, 0]
    assert notices[0] == f"worker 1 is replaced ({type(death).__name__}: {why})"


def raised(cause: Exception) -> RayTaskError:
    """What came of a call, or of a start, in which this was raised."""
    return RayTaskError("method", "trace", cause)


def test_what_a_broken_machine_may_raise_costs_one_worker_and_the_second_time_the_round(start: Any) -> None:
    broken_gpu = raised(RuntimeError("CUDA error: an illegal memory access\nCompile with TORCH_USE_CUDA_DSA"))

    def broken(process: int, method: str, arguments: tuple[Any, ...]) -> tuple[float, Any]:
        seconds, result = well(process, method, arguments)
        return seconds, broken_gpu if method != "start" and (process == 0 or arguments == (9,)) else result

    pool, _, notices = start(broken)
    assert pool.run([call(5)]) == [1]
    assert notices[0] == "worker 0 is replaced (CUDA error: an illegal memory access)"
    with pytest.raises(RayTaskError) as error:
        pool.run([call(9)])
    assert error.value is broken_gpu
    assert pool.restarts == 2


def test_what_is_not_a_machines_fault_is_raised_at_once(start: Any) -> None:
    def refusing(process: int, method: str, arguments: tuple[Any, ...]) -> tuple[float, Any]:
        seconds, result = well(process, method, arguments)
        return seconds, result if method == "start" else raised(ValueError("task.max_tokens: too many"))

    pool, _, _ = start(refusing)
    with pytest.raises(ValueError, match=r"^task.max_tokens: too many$"):
        pool.run([call(5)])
    assert pool.restarts == 0


@pytest.mark.parametrize("in_vain", [2, 100])
def test_a_replacement_may_have_to_wait_for_what_its_predecessor_held(start: Any, in_vain: int) -> None:
    def slow_to_free(process: int, method: str, arguments: tuple[Any, ...]) -> tuple[float, Any]:
        if method == "start" and 0 < process <= in_vain:
            return 1.0, raised(ValueError("Free memory on device cuda:0 is less than desired"))
        return (1.0, ActorDiedError()) if method != "start" and process == 0 else well(process, method, arguments)

    pool, cluster, _ = start(slow_to_free, nodes=[1.0], workers=1)
    if in_vain == 2:
        assert pool.run([call(5)]) == [3]
        return
    with pytest.raises(ValueError, match=r"^Free memory on device"):
        pool.run([call(5)])
    assert len(cluster.processes) == 1 + 1 + 3


def test_a_call_that_kills_every_worker_ends_the_run(start: Any) -> None:
    def deadly(process: int, method: str, arguments: tuple[Any, ...]) -> tuple[float, Any]:
        return (1.0, {}) if method == "start" else (1.0, ActorDiedError() if arguments[0] == 9 else process)

    pool, _, _ = start(deadly, retries=2)
    with pytest.raises(ValueError, match=r"a call of 9 s cost 3 workers, .* `es-engine resume RUN` tries"):
        pool.run([call(1), call(9)])
    assert pool.restarts == 3


def test_time_limits_count_from_the_beginning_of_each_call(start: Any) -> None:
    pool, _, notices = start(well, workers=1, chunk_timeout_s=10.0)
    assert pool.run([call(9)] * 5) == [0] * 5
    assert not notices


def test_a_call_past_its_limit_goes_to_another_worker(start: Any) -> None:
    def stuck(process: int, method: str, arguments: tuple[Any, ...]) -> tuple[float, Any]:
        return (1e9, None) if process == 0 and method != "start" else well(process, method, arguments)

    pool, cluster, notices = start(stuck, chunk_timeout_s=100.0)
    assert pool.run([call(30)]) == [1]
    assert cluster.now < 1 + 100 + 5 + 30
    assert notices == [
        "waiting 61 s for a call of 30 s on worker 0",
        "worker 0 is replaced (a call of 30 s took more than 100 s)",
        "a call of 30 s is given out again",
    ]
    assert notices[0].about == {"worker": 0, "call": "a call of 30 s"}


# --- nodes that come and go


def test_a_node_that_joins_is_used_within_the_round_under_way(start: Any) -> None:
    pool, cluster, notices = start(well, workers={"min": 1, "max": 5})
    assert pool.size == 4
    cluster.at(10, lambda: cluster.join(2))
    results = pool.run([call(5) for _ in range(40)])
    assert set(results) == {0, 1, 2, 3, 4}
    assert cluster.processes[4].node == name(2)
    assert cluster.now < 1 + 50
    assert notices == ["1 workers more, 5 now: there is room for them"]
    assert pool.restarts == 0


def test_auto_grows_with_the_cluster_and_a_number_does_not(start: Any) -> None:
    for workers, size in (("auto", 6), (3, 3)):
        pool, cluster, _ = start(well, workers=workers)
        cluster.at(3, lambda cluster=cluster: cluster.join(2))
        pool.run([call(5) for _ in range(20)])
        assert pool.size == size


def test_a_lost_node_takes_its_workers_and_the_others_do_their_calls(start: Any) -> None:
    pool, cluster, notices = start(well, workers="auto")
    cluster.at(4, lambda: cluster.lose(1))
    assert set(pool.run([call(5) for _ in range(8)])) == {0, 1}
    assert pool.size == 2
    assert pool.restarts == 2
    assert cluster.now < 1 + 5 * 4 + 5
    lost = [f"worker {index} is lost ({DIED}); there is no room for another" for index in (2, 3)]
    assert [notice for notice in notices if notice.startswith("worker")] == lost


def test_a_replacement_goes_where_there_is_room(start: Any) -> None:
    pool, cluster, notices = start(well, workers=2)
    assert [process.node for process in cluster.processes] == [name(0), name(0)]
    cluster.at(4, lambda: cluster.lose(0))
    assert set(pool.run([call(5) for _ in range(4)])) == {2, 3}
    assert [process.node for process in cluster.processes[2:]] == [name(1), name(1)]
    replaced = [f"worker {index} is replaced ({DIED})" for index in (0, 1)]
    assert [notice for notice in notices if notice.startswith("worker")] == replaced


def test_a_node_whose_loss_nobody_is_told_of_is_noticed(start: Any) -> None:
    """Calls to it never return, as where a cable is cut."""

    def cut_off(process: int, method: str, arguments: tuple[Any, ...]) -> tuple[float, Any]:
        lost = process > 1 and method != "start"
        return (1e9, None) if lost else well(process, method, arguments)

    pool, cluster, _ = start(cut_off, workers="auto")
    cluster.at(4, lambda: cluster.nodes_alive.pop(name(1)))
    assert set(pool.run([call(5) for _ in range(8)])) == {0, 1}
    assert cluster.now < 60


def test_too_few_workers_wait_for_a_node(start: Any) -> None:
    pool, cluster, notices = start(well, workers={"min": 3, "max": 4}, node_timeout_s=100.0)
    cluster.at(4, lambda: cluster.lose(0))
    cluster.at(5, lambda: cluster.lose(1))
    cluster.at(80, lambda: cluster.join(2, cpus=3.0))
    assert set(pool.run([call(5) for _ in range(8)])) <= {4, 5, 6, 7, 8, 9}
    assert pool.size == 3
    assert 80 < cluster.now < 105
    assert "2 of at least 3 workers have room; nodes are waited for up to 100 s" in notices


def test_without_a_node_in_time_the_run_ends_in_a_sentence(start: Any) -> None:
    pool, cluster, _ = start(well, node_timeout_s=100.0)
    cluster.at(4, lambda: [cluster.lose(node) for node in (0, 1)])
    with pytest.raises(ValueError, match=r"^pool.workers: 0 of at least 2 workers have room, and no node came"):
        pool.run([call(5)])
    assert 104 < cluster.now < 110


@pytest.mark.parametrize("kind", [ValueError, ImportError, RuntimeError])
def test_a_late_node_where_workers_cannot_start_is_left_out(start: Any, kind: type[Exception]) -> None:
    def choosy(process: int, method: str, arguments: tuple[Any, ...]) -> tuple[float, Any]:
        if process == 4:
            return 1.0, raised(kind("model.source: differs"))
        return (1.0, ActorDiedError()) if process > 4 else well(process, method, arguments)

    pool, cluster, notices = start(choosy, workers={"min": 1, "max": 5}, retries=1)
    cluster.at(3, lambda: cluster.join(2))
    cluster.at(30, lambda: cluster.join(3))
    assert set(pool.run([call(5) for _ in range(60)])) == {0, 1, 2, 3}
    barred = [notice for notice in notices if "no more workers" in notice]
    assert ["model.source: differs" in notice for notice in barred] == [True, False]


def test_where_the_only_node_for_workers_cannot_start_any_the_run_ends_at_once_and_says_why(start: Any) -> None:
    """Beside a head without CPUs, on which nothing can go on."""

    def doomed(process: int, method: str, arguments: tuple[Any, ...]) -> tuple[float, Any]:
        return 1.0, ActorDiedError()

    with pytest.raises(ValueError, match=rf"^worker 0 died 4 times while starting \({DIED}\)$"):
        start(doomed, nodes=[0.0, 1.0], workers=1)


@pytest.mark.parametrize("how", [ActorDiedError(), RayTaskError("start", "trace", RuntimeError("CUDA error: unknown"))])
@pytest.mark.parametrize(("nodes", "workers"), [([2.0], "auto"), ([2.0, 2.0], {"min": 3, "max": 4})])
def test_a_place_where_no_other_worker_can_start_costs_that_worker_alone(
    start: Any, how: Exception, nodes: list[float], workers: Any
) -> None:
    """As where one of a node's GPUs is broken; workers that die later are replaced on the same node."""
    first = int(sum(nodes))

    def broken(process: int, method: str, arguments: tuple[Any, ...]) -> tuple[float, Any]:
        if method == "start" and first <= process < first + 4:
            return 1.0, how
        dies = process == 0 and method != "start"
        return (1.0, ActorDiedError()) if dies else well(process, method, arguments)

    pool, cluster, notices = start(broken, nodes=nodes, workers=workers)
    cluster.at(40, cluster.processes[1].die)
    assert set(pool.run([call(5) for _ in range(12 * first)])) == {*range(1, first), first + 4}
    assert pool.size == first - 1
    assert sum("worker 0 is given up" in notice for notice in notices) == 1
    assert not any("given no more workers" in notice for notice in notices)
    assert len(cluster.processes) == first + 5


def test_a_run_whose_last_place_is_lost_too_ends_at_once_and_waits_for_none_that_was_given_up(start: Any) -> None:
    def broken(process: int, method: str, arguments: tuple[Any, ...]) -> tuple[float, Any]:
        dies = process > 1 if method == "start" else process == 1 or arguments == (9,)
        return (1.0, ActorDiedError()) if dies else well(process, method, arguments)

    pool, cluster, notices = start(broken, nodes=[1.0, 1.0], workers="auto")
    assert pool.run([call(5), call(5)]) == [0, 0]
    assert any("worker 1 is given up" in notice for notice in notices)
    began = cluster.now
    with pytest.raises(ValueError, match=r"^worker 0 died 4 times while starting"):
        pool.run([call(9)])
    assert cluster.now < began + 30


def test_with_bounds_the_autoscaler_is_asked_for_the_most_workers_until_the_end(start: Any) -> None:
    pool, cluster, _ = start(well, workers={"min": 1, "max": 5}, threads=2)
    assert cluster.requests == [[{"CPU": 2.0}] * 5]
    pool.close()
    assert cluster.requests[1:] == [[]]
    for workers in (2, "auto"):
        pool, cluster, _ = start(well, workers=workers)
        pool.close()
        assert cluster.requests == []


def test_a_worker_on_gpus_is_asked_for_in_one_piece() -> None:
    pool = PoolConfig(workers=WorkerRangeConfig(max=2), threads=3, tensor_parallel=4)
    assert bundles(pool, on_gpu=True) == [{"CPU": 3.0, "GPU": 4.0}] * 2


def test_with_bounds_a_cluster_without_room_is_given_time_to_get_nodes(start: Any) -> None:
    pool, cluster, notices = start(well, nodes=[0.0], joins_at=300, workers={"min": 2, "max": 4})
    assert pool.size == 2
    assert 300 < cluster.now < 310
    assert notices[0] == "0 of at least 2 workers have room; nodes are waited for up to 600 s"
    with pytest.raises(ValueError, match=r"^pool.workers: 0 of at least 2 workers have room, and no node came"):
        start(well, nodes=[0.0], workers={"min": 2, "max": 4})
    with pytest.raises(ValueError, match=r"room for 1 workers of 1 CPU\(s\) each, not 2"):
        start(well, nodes=[1.0], workers=2)


# --- a full object store


def test_what_is_shared_waits_for_room(start: Any) -> None:
    pool, cluster, notices = start(well)
    cluster.full_until = 100.0
    assert pool.put("theta") == "theta"
    assert 100 <= cluster.now < 102
    assert notices == ["Ray's object store is full; room in it is waited for up to 600 s"]
    cluster.full_until = math.inf
    with pytest.raises(ValueError, match=r"^Ray's object store on the driver's node and the disk .* make room"):
        pool.put("theta")
    assert 700 < cluster.now < 705


@pytest.mark.parametrize("node", ["the worker's", "the driver's"])
def test_an_answer_without_room_is_given_again_by_a_worker_that_lives(start: Any, node: str) -> None:
    error = RayTaskError("evaluate", "trace", OutOfDiskError()) if node == "the worker's" else OutOfDiskError()
    full_until, times = 50.0, []

    def full(process: int, method: str, arguments: tuple[Any, ...]) -> tuple[float, Any]:
        if method == "start" or arguments != (7,):
            return well(process, method, arguments)
        times.append(cluster.now)
        return 7.0, error if cluster.now < full_until else process

    pool, cluster, notices = start(full)
    assert pool.run([call(7), call(3)])[0] in (0, 1)
    assert (pool.restarts, pool.retries) == (0, len(times) - 1)
    assert set(notices) == {"a call of 7 s is given out again (Ray's object store is full)"}
    full_until = math.inf
    with pytest.raises(ValueError, match=r"^Ray's object store on node 0+ and .* `es-engine resume RUN` goes on"):
        pool.run([call(7)])


# --- slow workers


def slow(process: int, method: str, arguments: tuple[Any, ...]) -> tuple[float, Any]:
    """As `well`, on a first worker that takes ten times as long."""
    seconds, result = well(process, method, arguments)
    return (10 * seconds if process == 0 and method != "start" else seconds), result


def test_a_late_call_is_given_to_an_idle_worker_too_and_the_first_answer_counts(start: Any) -> None:
    pool, cluster, _ = start(slow)
    assert pool.run([call(5) for _ in range(4)]) == [1, 1, 1, 1]
    assert cluster.now == pytest.approx(1 + 20, abs=1)
    assert pool.speculative == 1
    assert pool.run([call(5), call(5)]) == [1, 1]  # while the other is still at the call that nobody waits for
    assert pool.run([call(5) for _ in range(6)])[0] == 0 or cluster.now > 51
    assert pool.restarts == 0


def test_calls_that_prefer_a_late_worker_go_to_others(start: Any) -> None:
    pool, cluster, _ = start(slow)
    assert pool.run([call(5, 0), call(5, 0), call(5, 1), call(5, 0)]) == [1, 1, 1, 1]
    assert cluster.now < 1 + 40


def test_calls_of_about_equal_length_are_carried_out_once(start: Any) -> None:
    pool, _, _ = start(well, workers=4)
    pool.run([call(seconds) for seconds in (4, 9, 5, 11, 4, 8, 10)])
    assert pool.speculative == 0


def test_a_call_whose_second_worker_dies_is_still_answered_by_the_first(start: Any) -> None:
    def fragile(process: int, method: str, arguments: tuple[Any, ...]) -> tuple[float, Any]:
        dies = process == 1 and arguments == (7,)
        return (1.0, ActorDiedError()) if dies else slow(process, method, arguments)

    pool, _, _ = start(fragile)
    assert pool.run([call(7), call(5), call(5)]) == [0, 1, 1]
    assert pool.speculative >= 1


# --- replies that cannot be right


def test_a_worker_that_replies_nonsense_is_replaced_and_its_call_given_to_others(start: Any) -> None:
    def broken(process: int, method: str, arguments: tuple[Any, ...]) -> tuple[float, Any]:
        seconds, result = well(process, method, arguments)
        return seconds, float("nan") if process == 1 and method != "start" else result

    def fault(reply: Any) -> str | None:
        return "it is no number" if reply != reply else None

    pool, _, notices = start(broken)
    assert set(pool.run([Call(f"call {number}", "evaluate", (5,), fault=fault) for number in range(6)])) == {0, 2}
    assert notices == ["worker 1 is replaced (a bad reply to call 1: it is no number)", "call 1 is given out again"]
    with pytest.raises(ValueError, match=r"call 7 cost 4 workers, the last by a bad reply to call 7: never right"):
        pool.run([Call("call 7", "evaluate", (5,), fault=lambda _: "never right")])


def not_finite(reply: Any) -> str | None:
    return NotFinite("the loss is not finite") if reply != reply else None


def test_numbers_that_are_not_finite_cost_one_worker_and_the_second_time_the_round(start: Any) -> None:
    def wild(process: int, method: str, arguments: tuple[Any, ...]) -> tuple[float, Any]:
        seconds, result = well(process, method, arguments)
        return seconds, float("nan") if method != "start" and (process == 0 or arguments == (9,)) else result

    pool, _, notices = start(wild)
    assert pool.run([Call("call 1", "evaluate", (5,), fault=not_finite)]) == [1]
    assert notices[0] == "worker 0 is replaced (a bad reply to call 1: the loss is not finite)"
    calls = [Call(f"call of {seconds} s", "evaluate", (seconds,), fault=not_finite) for seconds in (9, 30, 5)]
    with pytest.raises(Diverged, match=r"^the loss is not finite in every reply to call of 9 s$"):
        pool.run(calls)
    assert (pool.restarts, pool.retries) == (2, 2)
    pool.count_anew()
    assert len(pool.run([call(5) for _ in range(4)])) == 4  # while one is still at a call that nobody waits for
    assert (pool.restarts, pool.retries) == (0, 0)


def test_where_a_call_may_cost_no_worker_numbers_that_are_not_finite_end_it_at_once(start: Any) -> None:
    pool, _, notices = start(well, retries=0)
    with pytest.raises(Diverged, match=r"in every reply to call 1$"):
        pool.run([Call("call 1", "evaluate", (5,), fault=lambda _: NotFinite("a figure is not finite"))])
    assert (pool.restarts, notices) == (0, [])


# --- stragglers


def test_once_there_are_enough_the_others_are_waited_for_so_long_and_no_longer(start: Any) -> None:
    pool, cluster, _ = start(slow, straggler_s=3.0)
    results = pool.run_until([call(2, 0), call(2, 1), call(2, 1)], lambda done: len(done) >= 2)
    assert results == [None, 1, 1]
    assert cluster.now == pytest.approx(1 + 4 + 3, abs=1.1)
    assert pool.run([call(2)]) == [1]


# --- another run


def assigned(name: str) -> Any:
    """The setup of another run."""
    return SimpleNamespace(name=name)


def test_every_living_worker_is_assigned_once_and_the_next_to_start_begins_with_the_run(start: Any) -> None:
    told: list[tuple[int, str, Any]] = []

    def listening(process: int, method: str, arguments: tuple[Any, ...]) -> tuple[float, Any]:
        told.append((process, method, [argument for argument in arguments if isinstance(argument, SimpleNamespace)]))
        if (process, method) == (1, "assign"):
            return 1.0, ActorDiedError()
        return (2.0, {}) if method in ("start", "assign") else (float(arguments[0]), process)

    pool, cluster, _ = start(listening)
    other = assigned("other")
    pool.assign(other)
    assert told[2:] == [(0, "assign", [other]), (1, "assign", [other]), (2, "start", [])]
    assert pool.run([call(5), call(5)]) == [0, 2]
    assert cluster.setups[0] is cluster.setups[1]
    assert cluster.setups[2] is other
    assert pool.restarts == 1


@pytest.mark.parametrize("late", [None, OutOfDiskError(), raised(RuntimeError("CUDA error")), raised(AssertionError())])
def test_a_worker_that_is_late_with_a_call_of_the_run_before_is_waited_for(start: Any, late: Exception | None) -> None:
    """Whatever comes of the call."""
    told: list[tuple[int, str]] = []

    def listening(process: int, method: str, arguments: tuple[Any, ...]) -> tuple[float, Any]:
        told.append((process, method))
        seconds, result = slow(process, method, arguments)
        return seconds, late if late and (process, method) == (0, "evaluate") else result

    pool, cluster, _ = start(listening)
    assert pool.run([call(5) for _ in range(4)]) == [1, 1, 1, 1]
    assert cluster.now < 30
    told.clear()
    pool.assign(assigned("other"))
    assert cluster.now > 50
    assert told == [(1, "assign"), (2, "start") if isinstance(late, RayTaskError) else (0, "assign")]
    assert pool.states() == {"busy": 0, "idle": 2, "starting": 0}


def test_a_replacement_that_is_still_starting_for_the_run_before_is_assigned_when_it_is_there(start: Any) -> None:
    told: list[tuple[int, str]] = []

    def slow(process: int, method: str, arguments: tuple[Any, ...]) -> tuple[float, Any]:
        told.append((process, method))
        if (process, method) == (1, "evaluate"):
            return 1.0, ActorDiedError()
        return ((50.0 if process == 2 else 1.0), {}) if method != "evaluate" else (float(arguments[0]), process)

    pool, _, _ = start(slow)
    assert pool.run([call(5, 0), call(5, 1)]) == [0, 0]
    told.clear()
    pool.assign(assigned("other"))
    assert told == [(0, "assign"), (2, "assign")]


# --- workers that share a process


def shared(process: int, method: str, arguments: tuple[Any, ...]) -> tuple[float, Any]:
    """As `well`, where `carry_out` is told the worker and the method."""
    assert method == "carry_out"
    worker, inner, *rest = arguments
    seconds, _ = well(process, inner, tuple(rest))
    return seconds, {} if inner in ("start", "assign") else (worker, process)


def test_simulated_workers_share_as_few_processes_as_hold_them(start: Any) -> None:
    pool, cluster, _ = start(shared, {"kind": "simulated", "workers_per_process": 4}, workers=9)
    assert [process.options["max_concurrency"] for process in cluster.processes] == [4, 4, 4]
    assert {process.options["num_cpus"] for process in cluster.processes} == {0}
    assert len({process.options["scheduling_strategy"].node_id for process in cluster.processes}) == 2
    assert pool.run([call(5)] * 9) == [(worker, worker % 3) for worker in range(9)]
    assert cluster.now == 1 + 5


def test_auto_simulates_a_worker_for_each_core(start: Any) -> None:
    pool, _, _ = start(shared, {"kind": "simulated"}, workers="auto")
    assert len(pool.workers) == 4


def test_workers_that_share_a_process_die_together_and_move_together(start: Any) -> None:
    def fragile(process: int, method: str, arguments: tuple[Any, ...]) -> tuple[float, Any]:
        seconds, outcome = shared(process, method, arguments)
        return (2.0, ActorDiedError()) if process == 0 and arguments[:2] == (2, "evaluate") else (seconds, outcome)

    pool, cluster, _ = start(fragile, {"kind": "simulated", "workers_per_process": 2}, workers=4)
    results = pool.run([call(5) for _ in range(4)])
    assert sorted(worker for worker, _ in results) == [0, 1, 2, 3]
    assert {process for _, process in results} == {1, 2}
    assert len(cluster.processes) == 3
    assert pool.restarts == 2
    assert cluster.now == 1 + 2 + 1 + 5


def test_hundreds_of_late_workers_are_told_of_on_one_screen(start: Any) -> None:
    engine = {"kind": "simulated", "workers_per_process": 100}
    pool, _, notices = start(shared, engine, workers=200)
    pool.run([call(100)] * 200)
    assert notices[0] == "waiting 61 s for a call of 100 s on worker 0"
    assert notices[-1] == "and as long for 192 other workers"
    assert len(notices) == 9


def test_workers_that_share_a_process_start_for_the_present_run(start: Any) -> None:
    starts: list[Any] = []

    def listening(process: int, method: str, arguments: tuple[Any, ...]) -> tuple[float, Any]:
        if arguments[1] == "start":
            starts.append(arguments[2])
        return shared(process, method, arguments)

    pool, cluster, _ = start(listening, {"kind": "simulated", "workers_per_process": 2}, workers=2)
    cluster.processes[0].die()  # which nobody has noticed yet
    starts.clear()
    pool.assign(assigned("other"))
    assert starts == [assigned("other")] * 2
    assert len(cluster.processes) == 2


def test_a_cluster_that_cannot_be_started_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray raises no kind of its own where its processes take too long."""

    def slow(**_: object) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(clusters, "ray", SimpleNamespace(init=slow, is_initialized=lambda: False))
    with pytest.raises(
        ValueError, match=r"^pool.address: no Ray cluster could be started here \(The current node timed"
    ):
        clusters.connect(None)


def test_an_interrupt_while_a_cluster_starts_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray makes a SystemError of it, by which the command line knows it."""

    def interrupted(**_: object) -> None:
        raise SystemError("returned a result with an exception set")

    monkeypatch.setattr(clusters, "ray", SimpleNamespace(init=interrupted, is_initialized=lambda: False))
    with pytest.raises(SystemError):
        clusters.connect(None)
