"""Faults on a real cluster of several nodes, each brought about once or often: the run's ledger and adapter are those
of the run that nothing happened to.

Workers are simulated, one a process; all else is real. `make chaos` writes down what it counted, and as stall by how
much the slowest generation took longer than the median.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faults
import pytest
import ray
from chaos_runs import config_of, stall_of_unharmed, train_and
from chaos_table import count
from ray.cluster_utils import Cluster
from small_runs import small_config

from es_engine.config import VllmEngineConfig
from es_engine.ledger import Ledger, first_difference
from es_engine.trainer import train
from workers import pool
from workers.cluster import living_nodes

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


class Nodes:
    """A cluster of a head, where the driver is and no worker, and worker nodes."""

    def __init__(self) -> None:
        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 100 << 20}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.workers: list[Any] = []

    @property
    def address(self) -> str:
        return self._cluster.address

    def join(self, cpus: int = 2) -> None:
        self.workers.append(self._cluster.add_node(num_cpus=cpus, object_store_memory=100 << 20))

    def lose(self) -> None:
        """Kill -9 of the raylet and all processes of the node that joined last."""
        self._cluster.remove_node(self.workers.pop(), allow_graceful=False)

    def shape(self, nodes: int) -> None:
        """Have so many worker nodes, of two CPUs each if they are new, and no others that Ray takes for alive."""
        while len(self.workers) < nodes:
            self.join()
        while len(self.workers) > nodes:
            self.lose()
        while len(living_nodes()) != 1 + nodes:
            time.sleep(0.1)

    def close(self) -> None:
        ray.shutdown()
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(faults.FOLDER, str(tmp_path_factory.mktemp("faults")))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setattr(pool, "SimulatedWorkers", faults.FaultySimulatedWorkers)
        patch.setattr(pool, "Worker", faults.FaultyWorker)
        nodes = Nodes()
        ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
        try:
            yield nodes
        finally:
            nodes.close()


@pytest.fixture(scope="module")
def undisturbed(nodes: Nodes, random_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one worker that nothing happened to."""
    nodes.shape(2)
    return train(config_of(random_llama, 1), tmp_path_factory.mktemp("undisturbed") / "run").path


@pytest.fixture
def suffered(undisturbed: Path) -> Callable[..., None]:
    """Checks a run that faults struck, and counts it."""

    def check(fault: str, times: int, run: Path) -> None:
        assert faults.left() == []
        count(fault, times, stall_of_unharmed(run, undisturbed))

    return check


# --- workers

PHASES = ["generate", *(pytest.param(phase, marks=pytest.mark.chaos) for phase in ("slots", "score", "sum"))]


@pytest.mark.parametrize("phase", PHASES)
def test_workers_killed_in_a_phase_of_their_work(
    nodes: Nodes, random_llama: Path, tmp_path: Path, suffered: Callable[..., None], phase: str
) -> None:
    nodes.shape(2)
    run = train_and(config_of(random_llama, 3), tmp_path / "run", lambda: faults.place(*[f"{phase}.kill"] * 3))
    assert Ledger(run / "ledger.jsonl").generations[-1]["restarts"] == 3
    suffered(f"kill -9 of a worker ({phase})", 3, run)


@pytest.mark.chaos
def test_all_workers_killed_at_once(
    nodes: Nodes, random_llama: Path, tmp_path: Path, suffered: Callable[..., None]
) -> None:
    nodes.shape(2)
    run = train_and(config_of(random_llama, 4), tmp_path / "run", lambda: faults.place(*["generate.kill"] * 4))
    assert Ledger(run / "ledger.jsonl").generations[-1]["restarts"] == 4
    suffered("kill -9 of all workers at once", 1, run)


@pytest.mark.chaos
def test_a_stopped_worker_is_replaced_by_the_watchdog(
    nodes: Nodes, random_llama: Path, tmp_path: Path, suffered: Callable[..., None]
) -> None:
    """Nothing else would tell: the process lives, and its node too. A single worker, whose call nobody else takes."""
    nodes.shape(2)
    run = train_and(
        config_of(random_llama, 1, chunk_timeout_s=10.0), tmp_path / "run", lambda: faults.place("generate.stop")
    )
    assert Ledger(run / "ledger.jsonl").generations[-1]["restarts"] == 1
    suffered("SIGSTOP of a worker, until the watchdog (10 s) replaces it", 1, run)


@pytest.mark.chaos
def test_a_stopped_worker_beside_others_is_not_waited_for(
    nodes: Nodes, random_llama: Path, tmp_path: Path, suffered: Callable[..., None]
) -> None:
    """Its call, late, goes to another long before the watchdog comes."""
    nodes.shape(2)
    run = train_and(config_of(random_llama, 3), tmp_path / "run", lambda: faults.place("generate.stop"))
    last = Ledger(run / "ledger.jsonl").generations[-1]
    assert (last["restarts"], last["speculative"] >= 1) == (0, True)
    suffered("SIGSTOP of a worker beside others: the call goes to another", 1, run)


@pytest.mark.chaos
@pytest.mark.parametrize("fault", ["generate.raise", "generate.short", "sum.nan", "sum.short"])
def test_an_error_or_a_reply_that_cannot_be_right_costs_the_worker_and_not_the_run(
    nodes: Nodes, random_llama: Path, tmp_path: Path, suffered: Callable[..., None], fault: str
) -> None:
    nodes.shape(2)
    run = train_and(config_of(random_llama, 2), tmp_path / "run", lambda: faults.place(fault))
    assert Ledger(run / "ledger.jsonl").generations[-1]["restarts"] == 1
    suffered(f"a worker's error or bad reply ({fault})", 1, run)


# --- nodes


def test_a_node_is_lost_and_another_joins(
    nodes: Nodes, random_llama: Path, tmp_path: Path, suffered: Callable[..., None]
) -> None:
    """From two workers to one to three."""
    nodes.shape(0)
    nodes.join(cpus=1)
    nodes.join(cpus=1)

    def change() -> None:
        nodes.lose()
        nodes.join(cpus=2)

    with faults.pauses(0.7):  # so that the run goes on for longer than a node takes to join
        run = train_and(config_of(random_llama, {"min": 1, "max": 3}), tmp_path / "run", change)
    first, *_, last = Ledger(run / "ledger.jsonl").generations
    assert set(first["workers"]) == {0, 1}
    assert set(last["workers"]) == {0, 1, 2}
    assert last["restarts"] >= 1
    suffered("kill -9 of a raylet with its workers, and a node that joins late: 2, 1, 3 workers", 1, run)


# --- slots


@pytest.mark.chaos
@pytest.mark.vllm
def test_a_vllm_worker_killed_in_every_phase(nodes: Nodes, random_llama: Path, tmp_path: Path) -> None:
    """One worker, so that each phase's fault costs an engine with its slots, noise and prefix cache."""
    nodes.shape(1)
    method = {"population": 8, "sigma": 0.3, "prompts": 4}
    config = small_config(random_llama, method, budget={"generations": 3}, evaluation={"every": 3, "problems": 8})
    engine = VllmEngineConfig(dtype="float32", chunk=2, max_model_len=64, kv_cache_gib=0.0625)
    config = config.model_copy(update={"engine": engine})
    undisturbed = train(config, tmp_path / "undisturbed").path
    phases = ("slots", "generate", "sum")
    run = train_and(config, tmp_path / "run", lambda: faults.place(*[f"{phase}.kill" for phase in phases]))
    assert faults.left() == []
    lines = Ledger(run / "ledger.jsonl").generations
    assert lines[-1]["restarts"] == len(phases)
    assert first_difference(run / "ledger.jsonl", undisturbed / "ledger.jsonl") is None
    seconds = [line["times"]["total"] for line in lines]
    count("kill -9 of a vLLM worker (slots, generate, sum)", len(phases), max(seconds) - min(seconds))
