"""What can befall Ray itself: a full object store, and a cluster that has nodes only when somebody asks for them.

Each on a Ray of its own, with simulated workers, one a process. Answers are too large for Ray to pass them by, so that
they are stored too.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import ray
from chaos_runs import config_of, stall_of_unharmed, train_and
from chaos_table import count
from ray.cluster_utils import Cluster
from ray.exceptions import OutOfDiskError

from es_engine.config import Config
from es_engine.ledger import Ledger, LedgerReader
from es_engine.trainer import train
from workers.cluster import living_nodes

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(600)]

STORE = 80 << 20
"""Bytes of an object store, about the least that Ray takes."""


def config(model: Path, workers: Any) -> Config:
    """A run of less than a minute, in which theta and the sums of noise have 28,672 numbers."""
    return config_of(model, workers, rank=32, step_ms=100.0)


@contextmanager
def local_ray(**system: Any) -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=STORE,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        _system_config=system,
    )
    try:
        yield
    finally:
        ray.shutdown()


@pytest.fixture(scope="module")
def undisturbed(random_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with local_ray():
        return train(config(random_llama, 2), tmp_path_factory.mktemp("undisturbed") / "run").path


@pytest.fixture
def suffered(undisturbed: Path) -> Callable[..., None]:
    """Checks a run that something befell, and counts it."""

    def check(fault: str, times: int, run: Path) -> None:
        count(fault, times, stall_of_unharmed(run, undisturbed))

    return check


def wait_until(happened: Callable[[], bool], seconds: float = 120.0) -> None:
    give_up = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < give_up
        time.sleep(0.1)


# --- the object store


def ballast() -> list[tuple[Any, Any]]:
    """Objects that fill the store, and on the disk some room beyond it if there is any; in use, so that Ray can move
    none of them."""
    held: list[tuple[Any, Any]] = []
    for size in (8 << 20, 1 << 20, 1 << 16):
        with suppress(OutOfDiskError):
            while sum(view.nbytes for _, view in held) < 1.1 * STORE:
                reference = ray.put(np.zeros(size, dtype=np.uint8))
                held.append((reference, ray.get(reference)))
    return held


def lines_of(run: Path) -> int:
    """How many lines a run's ledger has."""
    return len(list(LedgerReader(run / "ledger.jsonl").new_lines()))


def told(run: Path, words: str) -> list[str]:
    """The messages of a run's log with these words."""
    messages = [json.loads(line)["message"] for line in (run / "log.jsonl").read_text().splitlines()]
    return [message for message in messages if words in message]


def test_an_object_store_that_is_full_for_a_time(
    random_llama: Path, tmp_path: Path, suffered: Callable[..., None]
) -> None:
    """Ray puts on the disk what has no room, which takes seconds an object, and nobody else notices."""
    run = tmp_path / "run"
    lines: list[int] = []

    def fill() -> None:
        held = ballast()
        assert sum(view.nbytes for _, view in held) > STORE
        lines.append(lines_of(run))
        time.sleep(10)

    with local_ray(local_fs_capacity_threshold=1.0):
        train_and(config(random_llama, 2), run, fill)
    assert lines[0] < lines_of(run), "the store was full when the run had ended"
    assert told(run, "object store") == []
    suffered("an object store that is full for 10 s, with room on the disk", 1, run)


def test_an_object_store_and_a_disk_that_are_full_for_a_time(
    random_llama: Path, tmp_path: Path, suffered: Callable[..., None]
) -> None:
    """Until an answer has found no room and, after the fourth generation, until theta has."""
    run, held, append = tmp_path / "run", [], Ledger.append

    def append_and_fill(ledger: Ledger, line: dict[str, Any]) -> None:
        append(ledger, line)
        if (line["kind"], line.get("step")) == ("generation", 3):
            held.extend(ballast())

    def fill_and_free() -> None:
        filling = ballast()
        wait_until(lambda: bool(told(run, "is given out again (Ray's object store is full)")))
        filling.clear()
        wait_until(lambda: bool(told(run, "Ray's object store is full; room in it is waited for")))
        held.clear()

    # Any disk is too full.
    with local_ray(local_fs_capacity_threshold=0.0), patch.object(Ledger, "append", append_and_fill):
        train_and(config(random_llama, 2), run, fill_and_free)
    assert Ledger(run / "ledger.jsonl").generations[-1]["restarts"] == 0
    suffered("an object store that is full, and the disk too, until it is noticed", 2, run)


# --- the autoscaler

HEAD = "f" * 51 + "00000"
"""The node id of the head in Ray's made-up cloud."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def autoscaled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cluster of a head, whose autoscaler has up to three nodes of one CPU begin on this machine when they are asked
    for, and end when they are idle."""
    monkeypatch.setenv("RAY_FAKE_CLUSTER", "1")
    monkeypatch.setenv("AUTOSCALER_UPDATE_INTERVAL_S", "1")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    address = f"{ray.util.get_node_ip_address()}:{free_port()}"
    node_type = {"node_config": {}, "min_workers": 0}
    node = {"CPU": 1, "object_store_memory": STORE}
    cloud = {
        "cluster_name": "made-up",
        "max_workers": 3,
        "idle_timeout_minutes": 0.1,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": address,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {**node_type, "max_workers": 0, "resources": {"CPU": 0}},
            "ray.worker": {**node_type, "max_workers": 3, "resources": node},
        },
        "upscaling_speed": 1.0,
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        **{name: [] for name in ("cluster_synced_files", "head_start_ray_commands", "worker_start_ray_commands")},
        **{f"{name}_commands": [] for name in ("initialization", "setup", "head_setup", "worker_setup")},
        "file_mounts_sync_continuously": False,
    }
    (tmp_path / "cloud.yaml").write_text(json.dumps(cloud))
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "object_store_memory": STORE,
            "include_dashboard": False,
            "gcs_server_port": int(address.rpartition(":")[2]),
            "autoscaling_config": str(tmp_path / "cloud.yaml"),
            "env_vars": {"RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD},
        },
    )
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()
        for pid in raylets(address):  # those that the autoscaler began, should it not have ended them
            os.kill(pid, signal.SIGKILL)


def raylets(address: str) -> list[int]:
    """The raylets of a cluster on this machine."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # a process that has just ended
            words = path.read_bytes().split(b"\0")
            if words[0].endswith(b"/raylet") and any(address.encode() in word for word in words):
                found.append(int(path.parent.name))
    return found


def test_an_autoscaler_is_asked_for_nodes_while_a_run_lasts(
    autoscaled: None, random_llama: Path, tmp_path: Path, suffered: Callable[..., None]
) -> None:
    """There is none when the run begins, and none is left when it is over."""
    run = train(config(random_llama, {"min": 1, "max": 2}), tmp_path / "run").path
    assert {worker for line in Ledger(run / "ledger.jsonl").generations for worker in line["workers"]} == {0, 1}
    suffered("an autoscaler: from no node to two", 1, run)
    wait_until(lambda: len(living_nodes()) == 1)
