"""A Ray cluster: whether it is there, and whether its nodes have the same software."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping

from es_engine.doctor.base import Check, last_line

STATUS_SECONDS = 20
NODE_SECONDS = 60

SAME = ("python", "ray", "torch", "transformers", "vllm", "es-engine")
"""What all nodes should have in one version: Ray and Python to work together at all, the rest for equal results."""

# Joins the cluster of its argument and asks each node for the versions there; a line of JSON: by node, by name.
VERSIONS = """
import importlib.metadata, json, os, platform, sys
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

answer = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
address, seconds, *names = sys.argv[1:]
ray.init(address=address, log_to_driver=False, logging_level="ERROR")

@ray.remote(num_cpus=0, max_retries=0)
def versions():
    found = {"python": platform.python_version()}
    for distribution in importlib.metadata.distributions():
        name = str(distribution.name).removesuffix("-cpu")
        if name in names:
            found[name] = distribution.version
    return found

def on(node):
    return versions.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()

nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
asked = {on(node): f"{address} ({node[:8]})" for node, address in nodes.items()}
done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=float(seconds))
print(json.dumps({name: ray.get(task) if task in done else None for task, name in asked.items()}), file=answer)
"""


def check_ray_cluster(address: str) -> Check:
    """Whether a cluster is there."""
    name = f"ray cluster ({address})"
    remedy = "start it with `ray start --head`, or take its address out of RAY_ADDRESS or pool.address"
    command = [sys.executable, "-m", "ray.scripts.scripts", "status", "--address", address]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=STATUS_SECONDS)
    except subprocess.TimeoutExpired:
        return Check(name, "fail", f"no answer in {STATUS_SECONDS} s", remedy)
    if done.returncode != 0:
        return Check(name, "fail", last_line(done.stderr or done.stdout), remedy)
    usage = [line.strip() for line in done.stdout.splitlines() if line.strip().endswith(("CPU", "GPU"))]
    return Check(name, "ok", f"in use: {', '.join(usage)}")


def check_ray_versions(address: str) -> Check:
    """Whether the nodes of a cluster that is there, and this machine, have the same software."""
    command = [sys.executable, "-c", VERSIONS, address, str(NODE_SECONDS / 2), *SAME]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=NODE_SECONDS)
    except subprocess.TimeoutExpired:
        return Check("ray nodes", "fail", f"no answer in {NODE_SECONDS} s", "see `ray status` and the nodes' logs")
    if done.returncode != 0:
        return not_joined(done.stderr)
    return compare_versions(json.loads(done.stdout))


def not_joined(said: str) -> Check:
    """What kept this machine from joining, by what Ray said of it."""
    _, mismatch, versions = said.partition("Version mismatch:")
    if mismatch:
        detail = f"this machine cannot join: {' '.join(versions.split())}"
        return Check("ray nodes", "fail", detail, "install the same Ray and Python on every node")
    return Check("ray nodes", "fail", last_line(said), "see `ray status` and the nodes' logs")


def compare_versions(nodes: Mapping[str, Mapping[str, str] | None]) -> Check:
    """What differs between nodes, by the versions of each; None where a node gave no answer."""
    silent = [node for node, versions in nodes.items() if versions is None]
    if silent:
        return Check("ray nodes", "fail", f"no answer from {', '.join(silent)}", "see the logs there, and restart Ray")
    differing = {name: found for name in SAME if len(found := _by_version(name, nodes)) > 1}
    if not differing:
        return Check("ray nodes", "ok", f"{len(nodes)}, with the same versions of {', '.join(SAME)}")
    shown = "; ".join(f"{name} {_differences(found)}" for name, found in differing.items())
    remedy = "install the same versions on every node, as in requirements/"
    return Check("ray nodes", "fail" if differing.keys() & {"python", "ray"} else "warn", shown, remedy)


def _differences(found: Mapping[str, list[str]]) -> str:
    return ", ".join(f"{version} on {' and '.join(nodes)}" for version, nodes in found.items())


def _by_version(name: str, nodes: Mapping[str, Mapping[str, str] | None]) -> dict[str, list[str]]:
    found: defaultdict[str, list[str]] = defaultdict(list)
    for node, versions in nodes.items():
        found[(versions or {}).get(name, "none")].append(node)
    return dict(found)
