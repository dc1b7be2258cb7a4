"""What the doctor finds, on this machine and on machines described by the files that their kernels show."""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private.utils import check_version_info

from es_engine.config import Config, SftMethodConfig, parse_config
from es_engine.doctor import cluster, examine, machine, software
from es_engine.doctor.base import GIB
from es_engine.doctor.run import ModelFacts, check_kv_cache, check_model, check_worker_memory
from es_engine.doctor.software import Gpu, Probe

MEMINFO = "MemTotal: 16777216 kB\nMemFree: 100 kB\nMemAvailable: 8388608 kB\n"
TWO_CORES = """\
processor : 0
physical id : 0
core id : 0
flags : fpu avx2 avx512f avx512_bf16

processor : 1
physical id : 0
core id : 0
flags : fpu avx2 avx512f avx512_bf16

processor : 2
physical id : 0
core id : 1
flags : fpu avx2 avx512f avx512_bf16
"""
WORKS = Probe(dict.fromkeys(software.MODULES.values()), gpus=())


def test_this_machine_can_run_the_engine() -> None:
    checks = examine()
    assert [check for check in checks if check.status == "fail"] == []
    names = [check.name for check in checks]
    assert len(names) == len(set(names))
    found = {check.name: check for check in checks}
    assert found["torch"].detail.startswith("2.")
    assert "vllm" in found["vllm"].detail
    assert found["demo model"].detail.startswith("SmolLM2")
    assert all(check.remedy for check in checks if check.status != "ok")


@pytest.mark.parametrize(
    ("version", "status"), [((3, 10), "fail"), ((3, 11), "ok"), ((3, 13), "ok"), ((3, 14), "fail")]
)
def test_python(version: tuple[int, int], status: str) -> None:
    assert machine.check_python(version).status == status


def test_cpu_counts_cores_and_names_extensions() -> None:
    check = machine.check_cpu(TWO_CORES, threads=4, usable=3)
    assert (check.status, check.detail) == ("ok", "3 of 4 threads usable, 2 cores; AVX2, AVX-512, bf16")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AVX-512 is asked of x86-64 only")
@pytest.mark.parametrize(
    ("flags", "found", "remedy"),
    [
        ("fpu avx2", "AVX2", "without AVX-512 bfloat16 is .* set engine.dtype=float32"),
        ("fpu", "no AVX2, AVX-512 or bf16", "vLLM's CPU build wants AVX2; engine.kind=hf runs without"),
    ],
)
def test_cpu_without_avx512_is_warned_of(flags: str, found: str, remedy: str) -> None:
    check = machine.check_cpu(f"flags : {flags}\n", threads=4, usable=4)
    assert (check.status, check.detail) == ("warn", f"4 of 4 threads usable, 4 cores; {found}")
    assert re.fullmatch(remedy, check.remedy)


def test_memory_is_bounded_by_the_control_group() -> None:
    assert machine.check_memory(MEMINFO, None).detail == "16.0 GiB, 8.0 GiB available"
    assert machine.check_memory(MEMINFO, 1 << 62).status == "ok"
    limited = machine.check_memory(MEMINFO, 2 << 30)
    assert limited.status == "warn"
    assert limited.detail.endswith("limited to 2.0 GiB by the control group")


@pytest.mark.parametrize(
    ("own_groups", "file"),
    [("0::/a/b\n", "a/memory.max"), ("0::/a/b\n", "memory.max"), ("0::/\n", "memory.max")]
    + [("4:cpu,memory:/a/b\n0::/\n", f"memory/{group}memory.limit_in_bytes") for group in ("", "a/", "a/b/")],
)
def test_memory_limit_of_own_or_higher_group(tmp_path: Path, own_groups: str, file: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("1073741824\n")
    assert machine.memory_limit(own_groups, tmp_path) == 1 << 30


def test_memory_without_limit(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.memory_limit("0::/a\n", tmp_path) is None


def test_disk_looks_at_the_nearest_folder_that_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "not" / "yet"
    assert str(folder) in machine.check_disk("disk", folder).detail
    monkeypatch.setattr(machine, "ENOUGH_DISK", 1 << 62)
    assert machine.check_disk("disk", folder).status == "warn"
    monkeypatch.setattr(machine, "LEAST_DISK", 1 << 62)
    assert machine.check_disk("disk", folder).status == "fail"


def test_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.check_shared_memory(tmp_path / "none").status == "warn"
    assert machine.check_shared_memory(tmp_path).status == "ok"
    monkeypatch.setattr(machine, "ENOUGH_SHARED_MEMORY", 1 << 62)
    assert "--shm-size" in machine.check_shared_memory(tmp_path).remedy


def test_probe_tells_what_imports_what_fails_and_what_crashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "chatty.py").write_text("print('noise')")
    (tmp_path / "broken.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    (tmp_path / "crashing.py").write_text("import os; os._exit(7)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    probe = software.probe_imports(["chatty", "broken", "crashing", "json"])
    assert probe.errors == {
        "chatty": None,
        "broken": "RuntimeError: operator torchvision::nms does not exist",
        "crashing": "the interpreter died of it (exit status 7)",
        "json": "the interpreter died of it (exit status 7)",
    }


def test_probe_gives_up_on_an_import_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hanging.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(software, "IMPORT_SECONDS", 0.5)
    assert software.probe_imports(["json", "hanging"]).errors["hanging"] == "the import did not end in 0.5 s"


def test_packages() -> None:
    assert software.check_package("torch", "2.13.0+cpu", WORKS).status == "ok"
    assert software.check_package("torch", None, WORKS).status == "fail"
    assert software.check_package("vllm", None, WORKS).status == "warn"
    broken = Probe({"peft": "ImportError: no such operator"}, gpus=())
    check = software.check_package("peft", "0.21", broken)
    assert (check.status, check.detail) == ("fail", "0.21 does not import: ImportError: no such operator")


def test_installed_version_prefers_the_first() -> None:
    assert software.installed_version(["no-such-distribution"]) is None
    version = software.installed_version(["pytest"])
    assert version == pytest.__version__
    assert software.installed_version(["no-such-distribution", "pytest", "ruff"]) == f"pytest {version}"


def test_torchvision_of_another_build_is_the_trap() -> None:
    assert software.check_torchvision(None, "2.13.0+cpu", WORKS).status == "ok"
    assert software.check_torchvision("0.28.0", "2.13.0", WORKS).status == "ok"
    trapped = Probe({"torchvision": "RuntimeError: operator torchvision::nms does not exist"}, gpus=())
    check = software.check_torchvision("0.28.0", "2.13.0+cpu", trapped)
    assert check.status == "fail"
    assert check.remedy.startswith("pip uninstall torchvision")


def test_gpus() -> None:
    assert software.check_gpus([], "2.13.0+cpu", None, WORKS).status == "ok"
    seen = software.check_gpus(["NVIDIA L4"], "2.13.0", None, Probe({}, (Gpu("NVIDIA L4", 20 * GIB, 22 * GIB),)))
    assert (seen.status, seen.detail) == ("ok", "1: NVIDIA L4 (22 GiB)")


@pytest.mark.parametrize(
    ("lists", "torch", "visible", "detail", "remedy"),
    [
        (
            ["NVIDIA L4"],
            "2.13.0+cpu",
            None,
            "the driver lists NVIDIA L4, but .* sees none: a CPU build",
            r"install_cuda\.sh",
        ),
        (["NVIDIA L4"], "2.13.0", "", "sees none: CUDA_VISIBLE_DEVICES=$", "^unset CUDA_VISIBLE_DEVICES"),
        (["NVIDIA L4"], "2.13.0", None, "the driver lists NVIDIA L4, but torch 2.13.0 sees none$", "update the driver"),
        ([], "2.13.0", None, "^none, but torch 2.13.0 is no CPU build$", "--gpus all"),
    ],
    ids=["torch has no CUDA", "they are hidden", "the driver is old", "there is no driver"],
)
def test_no_gpu_is_seen(lists: list[str], torch: str, visible: str | None, detail: str, remedy: str) -> None:
    check = software.check_gpus(lists, torch, visible, WORKS)
    assert check.status == "warn"
    assert re.search(detail, check.detail)
    assert re.search(remedy, check.remedy)


def test_memory_of_gpus_that_others_hold() -> None:
    assert software.check_gpu_memory([], 0.9).status == "ok"
    free, half_taken = Gpu("L4", 21 * GIB, 22 * GIB), Gpu("L4", 10 * GIB, 22 * GIB)
    assert software.check_gpu_memory([free, free], 0.9).status == "ok"
    check = software.check_gpu_memory([free, half_taken], 0.9)
    assert (check.status, check.detail) == ("warn", "10.0 of 22.0 GiB free on GPU 1; vLLM wants 90%")
    assert "engine.gpu_memory_utilization=0.45" in check.remedy


def test_ports() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        taken.listen()
        assert machine.refusal_of_port("127.0.0.1", port) == "in use"
        assert machine.check_metrics_port("127.0.0.1", port, wanted=False).status == "warn"
        taken_port = machine.check_metrics_port("127.0.0.1", port, wanted=True)
        assert (taken_port.status, "telemetry.prometheus_port" in taken_port.remedy) == ("fail", True)
        assert "pool.address=auto" in machine.check_ray_port(port, "Ray's head").detail
    assert machine.refusal_of_port("127.0.0.1", port) is None
    assert machine.check_metrics_port("127.0.0.1", port, wanted=True).status == "ok"
    elsewhere = machine.check_metrics_port("192.0.2.1", port, wanted=True)  # an address that no machine has
    assert (elsewhere.status, elsewhere.detail) == (
        "fail",
        "Cannot assign requested address at 192.0.2.1 (a run's metrics)",
    )


def test_the_metrics_port_is_the_one_that_is_scraped() -> None:
    deployed = (Path(__file__).parent.parent / "deploy/prometheus/prometheus.yml").read_text()
    assert f":{machine.METRICS_PORT}" in deployed


def test_ray_cluster_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "STATUS_SECONDS", 3)
    check = cluster.check_ray_cluster("127.0.0.1:1")
    assert check.status == "fail"
    assert check.remedy.startswith("start it")


NODE = {"python": "3.11.9", "ray": "2.60.0", "torch": "2.13.0", "transformers": "5.16.0", "vllm": "0.32.0"}


def test_nodes_with_the_same_software() -> None:
    check = cluster.compare_versions({"10.0.0.1 (aa)": NODE, "10.0.0.2 (bb)": NODE})
    assert check.status == "ok"
    assert check.detail.startswith("2, with the same versions of python, ray, torch")


@pytest.mark.parametrize(
    ("other", "status", "detail"),
    [
        ({**NODE, "ray": "2.59.1"}, "fail", "ray 2.60.0 on head, 2.59.1 on other"),
        (
            {**NODE, "torch": "2.12.0", "vllm": "0.31.0"},
            "warn",
            "torch 2.13.0 on head, 2.12.0 on other; vllm",
        ),
        ({name: NODE[name] for name in ("python", "ray")}, "warn", "torch 2.13.0 on head, none on other"),
        (None, "fail", "no answer from other"),
    ],
    ids=["Ray", "what computes", "Ray alone", "nothing"],
)
def test_nodes_with_other_software(other: dict[str, str] | None, status: str, detail: str) -> None:
    check = cluster.compare_versions({"head": NODE, "other": other})
    assert check.status == status
    assert check.detail.startswith(detail)
    assert check.remedy


def test_a_machine_whose_ray_is_not_the_clusters() -> None:
    """In the words of Ray itself, which lets no such node join."""
    with pytest.raises(RuntimeError) as error:
        check_version_info({"ray_version": "2.0.0", "python_version": "3.9.1"}, "node 10.0.0.2")
    check = cluster.not_joined(f"Traceback ...\nRuntimeError: {error.value}\n")
    assert check.status == "fail"
    assert "2.0.0" in check.detail
    assert ray.__version__ in check.detail
    assert check.remedy == "install the same Ray and Python on every node"
    assert cluster.not_joined("Traceback ...\nConnectionError: no\n\n").detail == "ConnectionError: no"


# --- what a run asks for


def config_of(source: str, engine: dict[str, Any] | None = None, **pool: Any) -> Config:
    return parse_config(
        {
            "name": "test",
            "model": {"source": source},
            "optimizer": {"lr": 1.0},
            "task": {},
            "engine": engine or {},
            "pool": {"workers": 2, **pool},
            "budget": {"generations": 1},
        }
    )


def test_a_model_that_can_be_read(random_llama: Path) -> None:
    check, facts = check_model(config_of(str(random_llama)).model)
    assert (check.status, check.detail) == ("ok", f"{random_llama}: 0.0 GiB")
    assert facts is not None
    assert facts.weights == (random_llama / "model.safetensors").stat().st_size
    assert facts.kv_bytes("bfloat16") == 2 * 2 * 1 * 32 * 2  # keys and values, layers, heads, their size, bytes
    types = {kind: facts.dtype_in(config_of(str(random_llama), {"kind": kind}).engine) for kind in ("vllm", "hf")}
    assert types == {"vllm": "bfloat16", "hf": "float32"}


def cut_short(model: Path) -> None:
    os.truncate(model / "model.safetensors", 5000)


def point_nowhere(model: Path) -> None:
    """As a file of a hub's cache that was cleaned."""
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to(model / "blob")


def take_the_weights_away(model: Path) -> None:
    (model / "model.safetensors").unlink()


def take_the_config_away(model: Path) -> None:
    (model / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut_short, "SafetensorError"),
        (point_nowhere, "FileNotFoundError"),
        (take_the_weights_away, "has no *.safetensors"),
        (take_the_config_away, "config.json"),
    ],
)
def test_a_model_that_cannot_be_read(
    random_llama: Path, tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(random_llama, model)
    damage(model)
    check, facts = check_model(config_of(str(model)).model)
    assert (check.status, facts) == ("fail", None)
    assert words in check.detail
    assert check.remedy


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nowhere/model.gguf", "FileNotFoundError"),
        ("package:no_such_package/model.gguf", "the package no_such_package is not installed"),
        ("nobody/no-such-model", "no such folder, and the hub"),
    ],
)
def test_a_model_that_is_not_there(source: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    check, _ = check_model(config_of(source).model)
    assert check.status == "fail"
    assert words in check.detail
    assert check.remedy


SMALL = ModelFacts(
    {
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 16,
        "max_position_embeddings": 131_072,
        "dtype": "bfloat16",
    },
    weights=2 * GIB,
)
"""A token takes 32 KiB of KV cache."""


def test_a_kv_cache_without_room_for_one_sequence() -> None:
    check = check_kv_cache(config_of("none"), SMALL, [])
    assert (check.status, check.detail) == ("fail", "a sequence of 131072 tokens takes 4.0 GiB, and there are 1.0")
    assert check.remedy == "engine.max_model_len=32768, or more engine.kv_cache_gib"
    assert check_kv_cache(config_of("none", {"max_model_len": 32768}), SMALL, []).status == "ok"
    assert check_kv_cache(config_of("none", {"max_model_len": 32768, "dtype": "float32"}), SMALL, []).status == "fail"
    assert check_kv_cache(config_of("none", {"kv_cache_gib": 4.0}), SMALL, []).status == "ok"
    tight, roomy = Gpu("tight", 4 * GIB, 4 * GIB), Gpu("roomy", 8 * GIB, 8 * GIB)
    check = check_kv_cache(config_of("none"), SMALL, [tight])
    assert (check.status, check.remedy.endswith("or more pool.tensor_parallel")) == ("fail", True)
    assert check_kv_cache(config_of("none", tensor_parallel=2), SMALL, [tight, tight]).status == "ok"
    assert check_kv_cache(config_of("none"), SMALL, [roomy]).status == "ok"


def test_workers_without_room_in_memory() -> None:
    check = check_worker_memory(config_of("none"), SMALL, 5 * GIB, cpus=8)
    detail = "2 workers with 2.0 GiB of weights and 1.0 of KV cache each take 6.0 GiB, and 5.0 are available"
    assert (check.status, check.detail) == ("fail", detail)
    assert check_worker_memory(config_of("none"), SMALL, 6 * GIB, cpus=8).status == "ok"
    hf = {"kind": "hf", "dtype": "float32"}
    assert check_worker_memory(config_of("none", hf), SMALL, 7 * GIB, cpus=8).status == "fail"
    gradients = config_of("none").model_copy(update={"method": SftMethodConfig()})
    assert check_worker_memory(gradients, SMALL, 9 * GIB, cpus=8).status == "fail"
    assert check_worker_memory(gradients, SMALL, 10 * GIB, cpus=8).status == "ok"
    for workers, there_are in (("auto", 4), ({"max": 3}, 3)):
        many = config_of("none", workers=workers, threads=2)
        assert check_worker_memory(many, SMALL, 64 * GIB, cpus=8).detail.startswith(f"{there_are} workers")


def test_a_config_is_examined_too(random_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "probe_imports", lambda _: WORKS)
    found = {check.name: check.status for check in examine(config_of(str(random_llama)))}
    assert {name: found[name] for name in ("model", "kv cache", "workers")} == dict.fromkeys(
        ("model", "kv cache", "workers"), "ok"
    )


def test_the_doctor_itself_needs_no_heavy_import() -> None:
    code = "import sys, es_engine.doctor; print(sorted({'torch', 'transformers', 'ray', 'vllm'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
