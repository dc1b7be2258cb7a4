"""The machine itself: its processor, memory, disks and ports."""

from __future__ import annotations

import errno
import os
import platform
import shutil
import socket
import sys
from pathlib import Path

from es_engine.doctor.base import GIB, Check, Status, fields, read

ENOUGH_MEMORY = 4 * GIB
ENOUGH_SHARED_MEMORY = 1 * GIB
ENOUGH_DISK = 5 * GIB
LEAST_DISK = 1 * GIB
METRICS_PORT = 9108  # of the documentation and of deploy/prometheus
RAY_PORTS = {6379: "Ray's head", 8265: "Ray's dashboard"}


def check_python(version: tuple[int, int]) -> Check:
    shown = f"{version[0]}.{version[1]} ({sys.executable})"
    if (3, 11) <= version < (3, 14):
        return Check("python", "ok", shown)
    return Check("python", "fail", shown, "use Python 3.11, 3.12 or 3.13")


def check_cpu(cpuinfo: str, threads: int, usable: int) -> Check:
    """`cpuinfo` is the text of /proc/cpuinfo, empty where there is none."""
    flags = set(fields(cpuinfo, "flags") + fields(cpuinfo, "Features"))
    extensions = [name for name, flag in (("AVX2", "avx2"), ("AVX-512", "avx512f")) if flag in flags]
    if flags & {"avx512_bf16", "amx_bf16", "bf16"}:
        extensions.append("bf16")
    detail = f"{usable} of {threads} threads usable, {physical_cores(cpuinfo) or threads} cores"
    detail += f"; {', '.join(extensions) or 'no AVX2, AVX-512 or bf16'}"
    if platform.machine() == "x86_64" and "AVX-512" not in extensions:
        return Check("cpu", "warn", detail, _remedy("AVX2" in extensions))
    return Check("cpu", "ok", detail)


def _remedy(avx2: bool) -> str:
    if avx2:
        return "without AVX-512 bfloat16 is several times slower than float32: set engine.dtype=float32"
    return "vLLM's CPU build wants AVX2; engine.kind=hf runs without"


def physical_cores(cpuinfo: str) -> int:
    """Distinct (socket, core) pairs; 0 where /proc/cpuinfo does not tell."""
    return len(set(zip(fields(cpuinfo, "physical id"), fields(cpuinfo, "core id"), strict=True)))


def usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_memory(meminfo: str, limit: int | None) -> Check:
    """`meminfo` is the text of /proc/meminfo; `limit` (bytes) is the control group's, None for none."""
    if not meminfo:
        return Check("memory", "warn", "unknown", "runs are supported on Linux")
    total, available = _memory(meminfo)
    detail = f"{total / GIB:.1f} GiB, {available / GIB:.1f} GiB available"
    if limit is not None and limit < total:
        detail += f", limited to {limit / GIB:.1f} GiB by the control group"
    if available_memory(meminfo, limit) < ENOUGH_MEMORY:
        return Check("memory", "warn", detail, "free some: the demo wants about 4 GiB, a larger model more")
    return Check("memory", "ok", detail)


def available_memory(meminfo: str, limit: int | None) -> int:
    """Bytes that processes begun now may use together; `meminfo` and `limit` as above."""
    _, available = _memory(meminfo)
    return available if limit is None else min(available, limit)


def _memory(meminfo: str) -> tuple[int, int]:
    """Bytes of memory, and of that what is available."""
    total, available = (int(fields(meminfo, name)[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    return total, available


def memory_limit(own_groups: str, root: Path) -> int | None:
    """The least memory limit, in bytes, of this process's control group and those above it (versions 1 and 2).

    `own_groups` is the text of /proc/self/cgroup, `root` the folder where control groups are mounted.
    """
    limits = []
    for line in own_groups.splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            limits += _limits(root, group, "memory.max")
        elif "memory" in controllers.split(","):
            limits += _limits(root / "memory", group, "memory.limit_in_bytes")
    return min(limits, default=None)


def _limits(mount: Path, group: str, file: str) -> list[int]:
    folder = Path(group.lstrip("/"))
    texts = (read(mount / part / file).strip() for part in (folder, *folder.parents))
    return [int(text) for text in texts if text.isdecimal()]


def check_shared_memory(folder: Path) -> Check:
    if not folder.is_dir():
        return Check("shared memory", "warn", f"no {folder}", "Ray's object store will be in a temporary folder: slow")
    size = shutil.disk_usage(folder).total
    detail = f"{size / GIB:.1f} GiB at {folder}"
    if size < ENOUGH_SHARED_MEMORY:
        return Check("shared memory", "warn", detail, "give Ray's object store room: docker run --shm-size=2g")
    return Check("shared memory", "ok", detail)


def check_disk(name: str, folder: Path) -> Check:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    detail = f"{free / GIB:.1f} GiB free at {folder}"
    if free >= ENOUGH_DISK:
        return Check(name, "ok", detail)
    status: Status = "warn" if free >= LEAST_DISK else "fail"
    return Check(name, status, detail, "free some: a model, its conversion and a run's checkpoints take gigabytes")


def model_cache() -> Path:
    """Where converted models are kept; workers.models, which keeps them, cannot be imported here (see above)."""
    return Path(os.environ.get("ES_ENGINE_CACHE", "~/.cache/es-engine")).expanduser().absolute()


def check_metrics_port(host: str, port: int, *, wanted: bool) -> Check:
    """The address that a run serves its metrics on; whether the config at hand has it do so."""
    refusal = refusal_of_port(host, port)
    if refusal is None:
        return Check(f"port {port}", "ok", "free (a run's metrics)")
    remedy = "another run may have it: set telemetry.prometheus_port to a free one, 0 for any, or null for none"
    return Check(f"port {port}", "fail" if wanted else "warn", f"{refusal} (a run's metrics)", remedy)


def check_ray_port(port: int, owner: str) -> Check:
    if refusal_of_port("127.0.0.1", port) is None:
        return Check(f"port {port}", "ok", f"free ({owner})")
    return Check(f"port {port}", "ok", f"in use, perhaps by {owner}: pool.address=auto joins a running cluster")


def refusal_of_port(host: str, port: int) -> str | None:
    """Why nothing can listen there; None if it can."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return "in use" if error.errno == errno.EADDRINUSE else f"{error.strerror} at {host}"
    return None
