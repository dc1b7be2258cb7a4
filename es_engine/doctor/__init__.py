"""What this machine has for a run, and what is missing.

Nothing here imports torch, transformers, Ray or vLLM into this process: a broken installation is among what is found.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from es_engine.config import Config, TelemetryConfig, VllmEngineConfig
from es_engine.doctor import machine, software
from es_engine.doctor.base import Check, read
from es_engine.doctor.cluster import check_ray_cluster, check_ray_versions
from es_engine.doctor.run import check_kv_cache, check_model, check_worker_memory

__all__ = ["Check", "examine"]


def examine(config: Config | None = None) -> list[Check]:
    """Look at the machine and, with a config, at whether its run finds there what it needs; takes as long as importing
    torch, transformers, PEFT, Ray and vLLM."""
    modules = software.MODULES
    versions = {name: software.installed_version(software.DISTRIBUTIONS.get(name, (name,))) for name in modules}
    probe = software.probe_imports([modules[name] for name, version in versions.items() if version])
    meminfo = read("/proc/meminfo")
    limit = machine.memory_limit(read("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    engine = config.engine if config and config.engine.kind == "vllm" else VllmEngineConfig()
    telemetry = config.telemetry if config else TelemetryConfig()
    host, port = telemetry.prometheus_host, telemetry.prometheus_port
    address = config.pool.address if config else os.environ.get("RAY_ADDRESS")
    return [
        machine.check_python(sys.version_info[:2]),
        machine.check_cpu(read("/proc/cpuinfo"), os.cpu_count() or 1, machine.usable_cpus()),
        machine.check_memory(meminfo, limit),
        machine.check_shared_memory(Path("/dev/shm")),
        machine.check_disk("disk (this folder)", Path.cwd()),
        machine.check_disk("disk (model cache)", machine.model_cache()),
        *(software.check_package(name, versions[name], probe) for name in modules if name != "torchvision"),
        software.check_torchvision(versions["torchvision"], versions["torch"], probe),
        software.check_gpus(software.nvidia_smi(), versions["torch"], os.environ.get("CUDA_VISIBLE_DEVICES"), probe),
        software.check_gpu_memory(probe.gpus, engine.gpu_memory_utilization),
        software.check_demo_model(),
        machine.check_metrics_port(host, port or machine.METRICS_PORT, wanted=bool(port)),
        *(machine.check_ray_port(port, owner) for port, owner in machine.RAY_PORTS.items()),
        *(_of_the_cluster(address) if address else ()),
        *(_of_the_run(config, probe.gpus, machine.available_memory(meminfo, limit)) if config and meminfo else ()),
    ]


def _of_the_cluster(address: str) -> Iterator[Check]:
    found = check_ray_cluster(address)
    yield found
    if found.status == "ok":
        yield check_ray_versions(address)


def _of_the_run(config: Config, gpus: tuple[software.Gpu, ...], memory: int) -> Iterator[Check]:
    """What the config asks of this machine, which has so many bytes of memory to give."""
    found, model = check_model(config.model)
    yield found
    if model is None:
        return
    if config.engine.kind == "vllm":
        yield check_kv_cache(config, model, gpus)
    if config.engine.kind != "simulated" and config.pool.address is None and not gpus:
        yield check_worker_memory(config, model, memory, machine.usable_cpus())
