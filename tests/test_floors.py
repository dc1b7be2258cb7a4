"""Imports go down the floors only, from the command line (5) to the verifiers (0)."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("es_engine", "workers", "rewards")

# A name covers the package or module and all below it; `es_engine` itself means its __init__ alone.
FLOORS = {
    "rewards": 0,
    "es_engine.noise": 1,
    "es_engine.costs": 1,
    "es_engine.text": 1,
    "es_engine.spaces": 1,
    "es_engine.losses": 1,
    "es_engine.optimizers": 1,
    "es_engine.config": 1,
    "workers": 2,
    "es_engine.methods": 3,
    "es_engine.ledger": 3,
    "es_engine.ledger_lines": 3,
    "es_engine.trainer": 4,
    "es_engine.past": 4,
    "es_engine.compare": 4,
    "es_engine.data": 4,
    "es_engine.telemetry": 4,
    "es_engine.report": 4,
    "es_engine.doctor": 4,
    "es_engine.models": 4,
    "es_engine.checkpoint": 4,
    "es_engine.evaluation": 4,
    "es_engine.scoring": 4,
    "es_engine.session": 4,
    "es_engine.run_folder": 4,
    "es_engine.run": 4,
    "es_engine.submit": 4,
    "es_engine.run_lock": 4,
    "es_engine.status": 4,
    "es_engine": 5,
    "es_engine.cli": 5,
}


def test_every_import_goes_down() -> None:
    faults = [fault for path in sources() for fault in faults_of(module_name(path), path.read_text())]
    assert not faults, "\n".join(faults)


def sources() -> Iterator[Path]:
    for package in PACKAGES:
        yield from sorted((ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def faults_of(module: str, source: str) -> list[str]:
    """What is wrong with the imports of one module, a sentence each."""
    here = floor_of(module)
    if here is None:
        return [f"{module} has no floor: give it one in FLOORS in tests/test_floors.py"]
    faults = []
    for target, line in dict.fromkeys(imports(module, source)):
        there = floor_of(target)
        if target.split(".")[0] in PACKAGES and there is None:
            faults.append(f"{module}:{line} imports {target}, which has no floor: give it one in tests/test_floors.py")
        elif target == "es_engine.cli":
            faults.append(f"{module}:{line} imports {target}, the roof: nothing may")
        elif there is not None and there > here:
            faults.append(f"{module}:{line} (floor {here}) imports {target} (floor {there}): imports go down only")
        elif module == "workers.scoring_child" and not allowed_in_scoring_child(target):
            faults.append(f"{module}:{line} imports {target}: it may import the standard library and rewards only")
    return faults


def floor_of(module: str) -> int | None:
    """The floor of the longest name in FLOORS that covers the module."""
    if module == "es_engine":
        return FLOORS[module]
    parts = module.split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((FLOORS[name] for name in names if name in FLOORS and name != "es_engine"), None)


def allowed_in_scoring_child(target: str) -> bool:
    top = target.split(".")[0]
    return top == "rewards" or top in sys.stdlib_module_names


def imports(module: str, source: str) -> Iterator[tuple[str, int]]:
    """Every module that the source imports, at any depth, with its line number."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = imported_from(module, node)
            # `from package import name` takes a module of that package, if there is one of that name.
            for alias in node.names:
                whole = f"{origin}.{alias.name}"
                yield (whole if is_module(whole) else origin), node.lineno


def imported_from(module: str, node: ast.ImportFrom) -> str:
    if node.level == 0:
        assert node.module is not None
        return node.module
    package = module if is_package(module) else module.rpartition(".")[0]
    for _ in range(node.level - 1):
        package = package.rpartition(".")[0]
    return f"{package}.{node.module}" if node.module else package


def is_package(module: str) -> bool:
    return (ROOT / module.replace(".", "/") / "__init__.py").is_file()


def is_module(name: str) -> bool:
    return is_package(name) or (ROOT / (name.replace(".", "/") + ".py")).is_file()


@pytest.mark.parametrize(
    ("module", "source", "words"),
    [
        ("rewards.base", "import workers.pool", "rewards.base:1 (floor 0) imports workers.pool (floor 2)"),
        ("es_engine.noise", "def f():\n    from workers import pool", "es_engine.noise:2"),
        ("workers.pool", "from es_engine import methods", "imports es_engine.methods (floor 3)"),
        ("workers.pool", "from es_engine import train", "imports es_engine (floor 5)"),
        ("es_engine.spaces.lora", "from ..telemetry import base", "imports es_engine.telemetry"),
        ("es_engine.trainer", "import es_engine.cli", "the roof"),
        ("es_engine", "from es_engine.cli import main", "the roof"),
        ("es_engine.unheard_of", "", "has no floor: give it one"),
        ("workers.pool", "import es_engine.unheard_of", "which has no floor: give it one"),
        ("workers.scoring_child", "import numpy", "the standard library and rewards only"),
        ("workers.scoring_child", "from workers import engine", "the standard library and rewards only"),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str, words: str) -> None:
    (fault,) = faults_of(module, source)
    assert words in fault


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("es_engine.config.tasks", "from rewards.base import register\nimport es_engine.noise"),
        ("es_engine.methods.es", "import workers.pool, torch\nfrom es_engine.spaces import lora"),
        ("workers.scoring_child", "import json, os.path\nfrom rewards.base import VerifierSpec"),
        ("es_engine.cli", "from es_engine import train"),
    ],
)
def test_a_right_import_passes(module: str, source: str) -> None:
    assert faults_of(module, source) == []
