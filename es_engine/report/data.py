"""From run folders to plain numbers. Nothing is written there: a run may be going on.

A line of an ES ledger holds a reward for each member and prompt, so that a long run has hundreds of megabytes of them;
they are read one line at a time, and of each only the figures that the page shows are kept.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from es_engine.config import dump_config
from es_engine.costs import Measure
from es_engine.ledger import LedgerReader, Line
from es_engine.run_folder import RunFolder, refuse_ways_out
from es_engine.text import name_of
from rewards.trees import flat

Array = npt.NDArray[np.float64]

MEASURES: tuple[str, ...] = get_args(Measure)
AXES = {
    "generated": "Generated tokens",
    "processed": "Processed tokens",
    "flops": "Estimated FLOPs",
    "worker_seconds": "Worker seconds",
    "steps": "Steps",
}
"""What curves can be drawn over, with how an axis is called."""

QUANTILES = {"lowest": 0.0, "lower quarter": 0.25, "median": 0.5, "upper quarter": 0.75, "highest": 1.0}
OF_NO_METHOD = ("name", "seed", "space.seed", "pool.", "telemetry.", "engine.chunk")
"""What may differ between the configs of seeds of the same method; `engine.chunk: auto` is timed by each run anew."""


@dataclass(frozen=True, slots=True)
class RunData:
    """What a run has come to so far.

    `figures` are by step and by name, (steps,), NaN where a step has none; `spent` is by axis what the run had spent
    before its first step and after each, (steps + 1,). `unscored` counts training rollouts without a score, `failures`
    what gave none: verifiers and parts of a sum, whose rollouts may have one from other parts.
    """

    name: str
    path: Path
    config: Mapping[str, Any]
    config_text: str
    finished: bool
    diverged: bool
    figures: Mapping[str, Array]
    spent: Mapping[str, Array]
    evaluations: tuple[Line, ...]
    unscored: int
    failures: Mapping[str, int]

    @property
    def steps(self) -> int:
        """How many steps are done."""
        return len(self.spent["steps"]) - 1

    @property
    def key(self) -> str:
        """What the run is known by on a page, whatever it is called there; it tells nobody where the run is."""
        return hashlib.sha256(os.fsencode(self.path.resolve())).hexdigest()[:16]

    @property
    def method(self) -> str:
        """The method, or those of the stages, with their variants."""
        return method_name(self.config)

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.config.get("seed", 0))

    def samples_file(self, step: int) -> Path:
        """The held-out completions of the evaluation after `step` steps."""
        return RunFolder(self.path).samples_file(step)


@dataclass(frozen=True, slots=True)
class RunGroup:
    """Runs that are shown as one curve, their mean: the seeds of a method, or a single run."""

    label: str
    runs: tuple[RunData, ...]

    @property
    def run_labels(self) -> tuple[str, ...]:
        """How each run is called where runs are shown one by one."""
        if len(self.runs) == 1:
            return (self.label,)
        seeds = [f"seed {run.seed}" for run in self.runs]
        names = [run.name for run in self.runs]
        numbers = [f"run {number}" for number, _ in enumerate(self.runs, start=1)]
        told = next(each for each in (seeds, names, numbers) if len(set(each)) == len(each))
        return tuple(f"{self.label}, {each}" for each in told)


class RunReader:
    """Reads a run, and later what was added to it."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError if the folder holds no run."""
        self.folder = RunFolder.existing(path)
        self._ledger = LedgerReader(self.folder.ledger_file)
        self._evaluations = LedgerReader(self.folder.eval_file)
        self._evaluated: dict[int, Line] = {}
        self._steps: list[dict[str, float]] = []
        self._unscored = 0
        self._failures: Counter[str] = Counter()

    def read(self) -> RunData:
        """The run as it is now. Raises ValueError if its files are damaged, or lead elsewhere by now."""
        refuse_ways_out(self.folder.path)
        finished = self.folder.adapter.is_dir()
        evaluations = (line for line in self._evaluations.new_lines() if line["kind"] == "evaluation")
        self._evaluated |= {line["step"]: line for line in evaluations}
        for line in self._ledger.new_lines():  # after the evaluations, so that the steps before them are there
            if line["kind"] == "generation":
                self._steps.append(step_figures(line))
                self._unscored += line.get("unscored", 0)
                self._failures.update(_failures(line))
        config = self.folder.load_config()
        steps = len(self._steps)
        return RunData(
            name=_name(name_of(self.folder.path), config.name),
            path=self.folder.path,
            config=config.model_dump(mode="json"),
            config_text=dump_config(config),
            finished=finished,
            diverged=self.folder.diverged_file.is_file(),
            figures=_columns(self._steps),
            spent={"steps": np.arange(steps + 1, dtype=np.float64), **{each: self._spent(each) for each in MEASURES}},
            evaluations=tuple(line for step, line in sorted(self._evaluated.items()) if step <= steps),
            unscored=self._unscored,
            failures=dict(self._failures),
        )

    @property
    def outdated(self) -> bool:
        """Is another run in the folder by now, or none?"""
        ledger = self.folder.ledger_file
        return self._ledger.bytes_read > (ledger.stat().st_size if ledger.exists() else 0)

    def _spent(self, measure: str) -> Array:
        costs = [step[f"costs/{measure}"] for step in self._steps]
        return np.concatenate([[0.0], np.cumsum(costs)])


def read_run(path: Path) -> RunData:
    """A run as it is now. Raises ValueError if the folder holds no run or its files are damaged."""
    return RunReader(path).read()


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """The run folders among paths, and those below the others, where links are not followed. A folder may still be
    empty, or not be there; one that may not be looked into counts as a run, which whoever reads it is told."""
    found: dict[Path, None] = {}
    todo = list(paths)[::-1]
    while todo:
        path = todo.pop()
        try:
            if _is_run(path):
                found[path] = None
            elif path.is_dir():
                todo += sorted((inner for inner in path.iterdir() if not inner.is_symlink()), reverse=True)
        except FileNotFoundError:
            continue  # it went meanwhile
        except PermissionError:
            found[path] = None
    return list(found)


def group_runs(runs: Sequence[RunData]) -> list[RunGroup]:
    """Runs whose configs are equal but for seeds and places, together under what their names have in common."""
    groups: dict[str, list[RunData]] = {}
    for run in runs:
        same = {key: value for key, value in flat(run.config) if not key.startswith(OF_NO_METHOD)}
        groups.setdefault(repr(sorted(same.items())), []).append(run)
    return _with_different_labels([RunGroup(_common_name(each), tuple(each)) for each in groups.values()])


def step_figures(line: Line) -> dict[str, float]:
    """The figures of a generation's line, by names such as `reward` or `learning/kl`; those that it lacks left out."""
    rollouts = line.get("rollouts") or 0
    named: dict[str, Any] = {
        "reward": line.get("reward_mean"),
        "accuracy": line.get("accuracy"),
        "spread": line.get("fitness_spread"),
        "sigma": line.get("sigma"),
        "lr": line.get("lr"),
        **_prefixed("components", line.get("components")),
        **_prefixed("learning", line.get("learning")),
        **_prefixed("costs", line["costs"]),
        **_prefixed("times", line.get("times")),
    }
    if rollouts:
        named["length"] = line["tokens"] / rollouts
        named["truncated"] = line["truncated"] / rollouts
        named["looped"] = line["looped"] / rollouts
        named["unscored"] = line.get("unscored", 0) / rollouts
    rewards = line.get("rewards") or []
    if any(len(row) > 1 for row in rewards):  # a row of one is constant whatever it is
        constant = line.get("constant_members", line.get("constant_groups"))
        named["constant"] = None if constant is None else constant / len(rewards)
    if "members" in line and (fitness := line.get("fitness") or rewards):
        named |= _prefixed("population", population(fitness))
    return {name: float(value) for name, value in named.items() if value is not None}


def population(fitness: Sequence[Sequence[float | None]]) -> dict[str, float]:
    """Quantiles over members of their mean fitness, given by member and problem; nothing where no member has any."""
    table = np.array(fitness, dtype=np.float64)  # None becomes NaN
    scored = ~np.isnan(table)
    members = scored.any(axis=1)
    if not members.any():
        return {}
    means = np.nan_to_num(table[members]).sum(axis=1) / scored[members].sum(axis=1)
    return dict(zip(QUANTILES, np.quantile(means, list(QUANTILES.values())), strict=True))


def method_name(config: Mapping[str, Any]) -> str:
    """A config's method, or those of its stages, with their variants."""
    stages = config.get("stages") or [config]
    return " → ".join(_variant(stage.get("method") or {}) for stage in stages)


def _variant(method: Mapping[str, Any]) -> str:
    kind = str(method.get("kind", "es"))
    variant = method.get("loss", method.get("fitness", "reward"))
    return kind if variant in (kind, "reward") else f"{kind} ({variant})"


def _name(folder: str, config: str) -> str:
    """A run is called as its folder, and as its config where that says the same and more: in a comparison, whose run
    `es-seed-1` is in a folder `es/seed-1`."""
    return config if config.endswith(folder) else folder


def _is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file()


def _prefixed(name: str, values: Mapping[str, Any] | None) -> dict[str, Any]:
    return {f"{name}/{key}": value for key, value in (values or {}).items()}


def _failures(line: Line) -> dict[str, int]:
    """Scores that were not given, by verifier, or part of a sum, and by kind."""
    kinds = line.get("failures") or {}
    return {f"{verifier}: {kind}": count for verifier, counts in kinds.items() for kind, count in counts.items()}


def _columns(rows: Sequence[Mapping[str, float]]) -> dict[str, Array]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: np.array([row.get(name, np.nan) for row in rows]) for name in names}


def _common_name(runs: Sequence[RunData]) -> str:
    if len(runs) == 1:
        return runs[0].name
    without_seed = {re.sub(r"([-_. ]+s|[-_. ]*seed)?[-_. ]*\d+$", "", run.name) for run in runs}
    common = without_seed.pop() if len(without_seed) == 1 else ""
    return common or runs[0].method


def _with_different_labels(groups: Sequence[RunGroup]) -> list[RunGroup]:
    """Labels that occur again get a number."""
    seen: Counter[str] = Counter()
    labelled = []
    for group in groups:
        seen[group.label] += 1
        number = seen[group.label]
        labelled.append(group if number == 1 else RunGroup(f"{group.label} ({number})", group.runs))
    return labelled
