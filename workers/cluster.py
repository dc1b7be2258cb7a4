"""The Ray cluster that workers run on: joining it, the nodes that it has and may get, whether its object store is full,
and what processes there inherit."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, RayTaskError

from es_engine.config import Config

KNOCK_S = 10.0
FULL = (ObjectStoreFullError, OutOfDiskError)
"""An object finds no room: a node's object store is full, and so is the disk that Ray would spill to."""
TOKEN = Path("~/.ray/auth_token").expanduser()
"""What Ray's processes know each other by, unless the environment says otherwise."""
PASSED_ON = ("ES_ENGINE_CACHE", "HF_HOME", "HF_HUB_OFFLINE", "VLLM_LOGGING_LEVEL")
CREDENTIALS = ("HF_TOKEN",)
"""What workers need too, but nobody else: Ray writes the environment that it is asked for into its logs."""


def connect(address: str | None) -> bool:
    """Join the cluster at `address`, or start a local one; True if one was started.

    Raises ValueError for a bad address, or where none can be started.
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
        try:
            with _on_loopback():
                ray.init(address="local", include_dashboard=False, **quiet)
        except SystemError:  # what Ray makes of an interrupt that comes meanwhile
            raise
        except Exception as error:  # of no kind of its own where a busy machine takes longer than Ray waits
            raise ValueError(
                f"pool.address: no Ray cluster could be started here ({error}); try again when this machine has less "
                "to do, or give the address of one"
            ) from error
        if TOKEN.is_file():  # which Ray lets everybody read
            TOKEN.chmod(0o600)
        return
    try:
        _knock(address)
        ray.init(address=address, **quiet)
    except OSError as error:  # ConnectionError and time-outs
        raise ValueError(
            f"pool.address: no Ray cluster answers at {address}; start one or use null for a local one"
        ) from error


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Inside, Ray takes 127.0.0.1 for the address of this machine, and what it starts listens there alone.

    It does so by itself where it knows no clusters, on macOS and Windows. There is no setting for it elsewhere: as an
    argument, that address is replaced by one that other machines reach.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _knock(address: str) -> None:
    """Raises OSError if nobody listens at host:port, which Ray itself would only find out after minutes."""
    host, colon, port = address.rpartition(":")
    if colon:
        socket.create_connection((host, int(port)), timeout=KNOCK_S).close()


def living_nodes() -> dict[str, dict[str, float]]:
    """The resources of the cluster's living nodes, by id."""
    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


def found_no_room(error: Exception) -> bool:
    """Whether a task, or the passing on of its answer, ended for want of room."""
    return isinstance(error.cause if isinstance(error, RayTaskError) else error, FULL)


def ask_autoscaler(bundles: Sequence[Mapping[str, float]]) -> None:
    """Have the cluster's autoscaler keep nodes on which all these bundles of resources find room at once, what is in
    use included; none takes the request back. A cluster has one request, the last; without an autoscaler nobody reads
    it."""
    from ray.autoscaler.sdk import request_resources  # only where it is wanted: it imports a lot

    request_resources(bundles=[dict(each) for each in bundles])


def on_gpus(config: Config, nodes: Mapping[str, Mapping[str, float]]) -> bool:
    """Whether the workers run on GPUs: the engine can, and a node has one, or no node can hold any worker yet."""
    import torch

    if torch.version.cuda is None or (config.engine.kind == "hf" and config.engine.device == "cpu"):
        return False
    have_gpu = any(each.get("GPU", 0) >= 1 for each in nodes.values())
    return have_gpu or all(each.get("CPU", 0) < 1 for each in nodes.values())


def environment(threads: int) -> dict[str, str]:
    """The environment variables of a worker that uses so many threads."""
    return {
        "OMP_NUM_THREADS": str(threads),
        # Spinning threads would take the cores from Ray's own processes.
        "OMP_WAIT_POLICY": "passive",
        # Gradients on a GPU are summed in a fixed order, for which torch wants this at its first product there, that is
        # vLLM's: it never looks again.
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        **{name: os.environ[name] for name in PASSED_ON if name in os.environ},
    }


def credentials() -> dict[str, str]:
    """What a worker is to have in its environment and nobody else's."""
    return {name: os.environ[name] for name in CREDENTIALS if name in os.environ}
