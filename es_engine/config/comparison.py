"""The configuration of a comparison: several runs on one pool, at one budget, each at its best."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, combinations, product
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, model_validator

from es_engine.config import yaml_text
from es_engine.config.base import (
    ConfigError,
    ConfigModel,
    PositiveFloat,
    PositiveInt,
    Seed,
    in_yaml,
    problem,
)
from es_engine.config.budget import BudgetConfig
from es_engine.config.errors import as_config_error
from es_engine.config.loading import (
    AXES,
    Tree,
    absolute_file,
    every_stage_has,
    merge,
    nested,
    override_tree,
    parse_config,
    read_text,
    read_tree,
    with_absolute_paths,
)
from es_engine.config.model import TinyModelConfig
from es_engine.config.root import Config, Name, generates
from es_engine.config.tasks import TaskConfig
from rewards.trees import flat

Setting = dict[str, Any]
"""Fields of a config by their dotted names, such as optimizer.lr, and their values."""

OUTSIDE = ("name", "seed", "budget")
"""What a comparison gives its runs itself."""
UNUSED = {"name", "telemetry", "evaluation"}
"""What does nothing to a trial, which is evaluated at its start and its end alone."""
SHARED = ("model", "task", "pool", "engine", "evaluation", "space.rank", "space.targets")
"""What one pool serves all runs with, and what they are measured by."""
OWN = ("evaluation.every",)
"""Of what is shared, what each run may have of its own: a step of one method may cost many of another."""
LAST_STEP_ONLY = 10**9
"""As `evaluation.every`: an evaluation at the start and one at the end."""
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}")


class TuningConfig(ConfigModel):
    """How the best setting of each grid is found."""

    seed: Seed = Field(
        default=0, description="Seed of all trials of the grids; where there are some, no final run has it."
    )
    problems: PositiveInt = Field(
        default=128,
        description="Problems of the validation split: the held-out problems that follow those of evaluation.problems.",
    )


class SamplesConfig(ConfigModel):
    """The last evaluation of a final run, from which pass@1 to pass@n are computed."""

    n: PositiveInt = Field(default=8, description="Completions of each held-out problem.")
    temperature: PositiveFloat = Field(default=1.0, description="Sampling temperature.")


class ComparisonConfig(ConfigModel):
    """Several runs and what they share.

    `run` and `runs` hold parts of configs as plain data: a run is its own part laid over the shared one. Its seed is
    also that of its space, unless the space has one: a method that samples nothing would be the same for all seeds.
    """

    name: Name = Field(description="Name of the comparison and, under comparisons/, of its folder.")
    run: dict[str, Any] = Field(default={}, description="What the runs share: a config file, or a part of a config.")
    budget: BudgetConfig = Field(description="When each run ends.")
    seeds: Annotated[tuple[Seed, ...], Field(strict=False, min_length=1)] = Field(
        default=(1, 2, 3), description="Seeds of the final runs."
    )
    tuning: TuningConfig = Field(default=TuningConfig(), description="How the best setting of each grid is found.")
    runs: Annotated[dict[str, dict[str, Any]], Field(min_length=1)] = Field(
        description="Config files or parts of a config by name; each may have a grid: lists of values by dotted field."
    )
    thresholds: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(strict=False)] = Field(
        default=(), description="Held-out accuracies; what it costs to reach each is reported."
    )
    other_tasks: dict[str, TaskConfig] = Field(
        default={}, description="Tasks by name, as under task; held-out ability at them is measured before and after."
    )
    samples: SamplesConfig = Field(default=SamplesConfig(), description="The sampled evaluation at the end.")

    @property
    def tunes(self) -> bool:
        """Whether there is anything to choose from."""
        return len(self.settings(next(iter(self.runs)))) > 1

    def grid(self, run: str) -> dict[str, list[Any]]:
        """The values to try of each field of a run; empty where it has no grid."""
        return dict(flat(self.runs[run].get("grid", {})))

    def settings(self, run: str) -> list[Setting]:
        """Every combination of a run's grid, the last field's values changing first; without a grid, one of nothing."""
        grid = self.grid(run)
        return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]

    def final(self, run: str, setting: Setting, seed: int) -> Config:
        """The config of a final run."""
        return self._config(run, setting, name=f"{run}-seed-{seed}", seed=seed)

    def trial(self, run: str, number: int) -> Config:
        """The config of trial `number`, from 1, of a run's grid: evaluated on the validation split, at the start and
        at the end."""
        config = self._config(run, self.settings(run)[number - 1], f"{run}-trial-{number:02d}", self.tuning.seed)
        validation = {"first": config.evaluation.numbers.stop, "problems": self.tuning.problems}
        evaluation = config.evaluation.model_copy(update={**validation, "every": LAST_STEP_ONLY})
        return config.model_copy(update={"evaluation": evaluation})

    def _config(self, run: str, setting: Setting, name: str, seed: int) -> Config:
        own = {key: value for key, value in self.runs[run].items() if key not in ("grid", "budget")}
        tree = merge({"space": {"seed": seed}}, merge(self.run, own))
        for key, value in setting.items():
            tree = merge(tree, nested(key, value))
        budget = self.budget.model_dump(exclude_none=True) | self.runs[run].get("budget", {})
        try:
            return parse_config({**tree, "name": name, "seed": seed, "budget": budget})
        except ConfigError as error:
            raise ConfigError("\n".join(f"runs.{run}.{line}" for line in str(error).splitlines())) from error

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        for name in chain(self.runs, self.other_tasks):
            if not _RUN_NAME.fullmatch(name):
                where = "runs" if name in self.runs else "other_tasks"
                raise problem(where, name, "names of up to 60 letters, digits, dots, dashes and underscores")
        if len(set(self.seeds)) < len(self.seeds):
            raise problem("seeds", self.seeds, "seeds that differ")
        return self

    @model_validator(mode="after")
    def _what_is_shared_stands_outside(self) -> Self:
        parts = {"run": self.run, **{f"runs.{run}": part for run, part in self.runs.items()}}
        for where, part in parts.items():
            for key in ("name", "seed", *(("budget", "grid") if where == "run" else ())):
                if key in part:
                    accepted = (
                        "nothing: that is in each of runs" if key == "grid" else "nothing: the comparison says it"
                    )
                    raise problem(f"{where}.{key}", part[key], accepted)
            budget = part.get("budget", {})
            if not isinstance(budget, dict):
                raise problem(f"{where}.budget", budget, "a mapping of limits beside those of budget")
            for limit in budget.keys() & self.budget.model_dump(exclude_none=True).keys():
                raise problem(f"{where}.budget.{limit}", budget[limit], "nothing: the comparison's budget has it")
        return self

    @model_validator(mode="after")
    def _grids_are_fair(self) -> Self:
        for run in self.runs:
            if not isinstance(self.runs[run].get("grid", {}), dict):
                raise problem(
                    f"runs.{run}.grid", self.runs[run]["grid"], "a mapping of dotted fields to lists of values"
                )
            for key, values in self.grid(run).items():
                where = f"runs.{run}.grid.{key}"
                if key.partition(".")[0] in (*OUTSIDE, "grid"):
                    raise problem(where, values, "a field of an axis: the comparison gives name, seed and budget")
                if not isinstance(values, list) or not values or any(a == b for a, b in combinations(values, 2)):
                    raise problem(where, values, "a list of values that differ")
                axis, stages = key.partition(".")[0], merge(self.run, self.runs[run]).get("stages")
                if every_stage_has(axis, stages):
                    raise problem(
                        where, values, f"nothing: every stage has {axis} of its own, so that all trials are one"
                    )
        counts = {run: math.prod(len(values) for values in self.grid(run).values()) for run in self.runs}
        if len(set(counts.values())) > 1:
            given = ", ".join(f"{run} {count}" for run, count in counts.items())
            raise ValueError(
                f"runs: grids of unequal size ({given}), accepted is the same number of trials for each run"
            )
        if self.tunes and self.tuning.seed in self.seeds:
            raise problem("tuning.seed", self.tuning.seed, "a seed that is not among seeds")
        return self

    @model_validator(mode="after")
    def _one_pool_serves_all(self) -> Self:
        configs = {run: [self._config(run, each, run, 0) for each in self.settings(run)] for run in self.runs}
        first, *_ = configs
        reference = configs[first][0]
        for run, config in [(run, config) for run, those in configs.items() for config in those]:
            for path, value, expected in _differences(config, reference):
                accepted = f"that of runs.{first}, {in_yaml(expected)}, for one pool serves all"
                raise problem(f"runs.{run}.{path}", value, accepted)
            self._check_stages(run, config)
        for run, each in configs.items():
            self._refuse_equal_trials(run, each)
        for name, task in self.other_tasks.items():
            try:
                on_other_task(reference, task)
            except ConfigError as error:
                lines = (line.removeprefix("task.") for line in str(error).splitlines())
                raise ConfigError("\n".join(f"other_tasks.{name}.{line}" for line in lines)) from error
        return self

    def _refuse_equal_trials(self, run: str, configs: Sequence[Config]) -> None:
        """Raises ValueError where two settings of a grid come to the same training: another run had more to choose
        from."""
        trained = [[_what_trains(stage) for stage in config.by_stage] for config in configs]
        for (number, one), (other, two) in combinations(enumerate(trained, start=1), 2):
            if one == two:
                accepted = f"settings that differ in training, which those of trials {number} and {other} do not"
                raise problem(f"runs.{run}.grid", self.grid(run), accepted)

    def _check_stages(self, run: str, config: Config) -> None:
        """Raises ValueError where the stages of a run, each of which has a budget, may spend more than others may."""
        own = self.runs[run].get("budget")
        if own and every_stage_has("budget", merge(self.run, self.runs[run]).get("stages")):
            raise problem(f"runs.{run}.budget", own, "nothing: every stage has a budget of its own")
        shared = self.budget.model_dump(exclude_none=True) if config.stages else {}
        for limit, most in shared.items():
            spending = [each for each in config.by_stage if limit != "tokens" or generates(each.method)]
            given = [getattr(each.budget, limit) for each in spending]
            if None in given or sum(given) > most:
                accepted = f"limits of {in_yaml(most)} together at most, for each run has one budget"
                raise problem(f"runs.{run}.stages.budget.{limit}", given, accepted)


def load_comparison(path: str | Path, overrides: Sequence[str] = ()) -> ComparisonConfig:
    """The comparison of a YAML file, after overrides such as `budget.tokens=1000` or `run.model.steps=40`.

    `run` and each of `runs` are the path of a config file, or mappings that may extend one; of such a file, name, seed,
    space.seed and budget do not count. Relative paths start as in `load_config`. Raises ConfigError.
    """
    path = Path(path).absolute()
    tree = yaml_text.parse(read_text(path), str(path))
    if not isinstance(tree, dict):
        accepted = ", ".join(ComparisonConfig.model_fields)
        raise ConfigError(f"{path}: got {in_yaml(tree)}, accepted is a mapping of {accepted}")
    _refuse_unknown(overrides, tree)
    return parse_comparison(merge(_with_whole_parts(tree, path.parent), override_tree(overrides)))


def parse_comparison(data: Mapping[str, Any]) -> ComparisonConfig:
    """The comparison of a mapping; relative paths start in the current directory. Raises ConfigError."""
    resolved = _with_whole_parts(dict(data), Path.cwd())
    try:
        return ComparisonConfig.model_validate(resolved)
    except ValidationError as error:
        raise as_config_error(error, ComparisonConfig, resolved) from error


def dump_comparison(comparison: ComparisonConfig) -> str:
    """YAML with every field, and files in place of their names; loads as an equal comparison from any folder."""
    return yaml_text.dump(comparison.model_dump(mode="json"))


def on_other_task(config: Config, task: TaskConfig) -> Config:
    """The config with another task, and the same model and space, for its evaluation alone: the least population stands
    in for the method, which need not suit that task. Raises ConfigError where model or engine does not suit it."""
    tree = config.model_dump(mode="json") | {"task": task.model_dump(mode="json"), "method": {"population": 2}}
    tree["stages"] = []
    tree["space"]["units"] = config.units
    tree["engine"]["chunk"] = 2
    if isinstance(config.model, TinyModelConfig):  # which would otherwise be taught the other task
        tree["model"]["lessons"] = config.lessons.model_dump(mode="json")
    return parse_config(tree)


def _refuse_unknown(overrides: Sequence[str], tree: Tree) -> None:
    """Raises ConfigError for an override of a part of a run, or of another task, that is not there: a slip would add
    one. One that gives it whole may add it. And for one of what a run's grid gives, which would do nothing."""
    known = {part: list(tree[part]) if isinstance(tree.get(part), dict) else [] for part in ("runs", "other_tasks")}
    for override in overrides:
        part, *names = override.partition("=")[0].split(".")
        if part not in known or not names:
            continue
        if len(names) > 1 and names[0] not in known[part]:
            accepted = ", ".join(f"{part}.{each}" for each in known[part]) or f"none, for there are no {part}"
            raise ConfigError(f"override {override}: there is no {part}.{names[0]}, accepted are {accepted}")
        known[part].append(names[0])
        field = ".".join(names[1:])
        if part == "runs" and field in _grid_of(tree, names[0]):
            raise ConfigError(
                f"override {override}: the grid of runs.{names[0]} gives {field}; set runs.{names[0]}.grid"
            )


def _grid_of(tree: Tree, run: str) -> Tree:
    """The grid of a run by its dotted fields, as far as there is one."""
    found: Any = tree
    for key in ("runs", run, "grid"):
        found = found.get(key) if isinstance(found, dict) else None
    return dict(flat(found)) if isinstance(found, dict) else {}


def _with_whole_parts(tree: Tree, folder: Path) -> Tree:
    """The same mapping with files read into `run` and `runs`, and the paths of other files absolute."""
    whole = dict(tree)
    if "run" in tree:
        whole["run"] = _whole_part(tree["run"], "run", folder)
    if isinstance(tree.get("runs"), dict):
        whole["runs"] = {name: _whole_part(part, f"runs.{name}", folder) for name, part in tree["runs"].items()}
    if isinstance(tree.get("other_tasks"), dict):
        whole["other_tasks"] = {
            name: with_absolute_paths({"task": task}, folder)["task"] for name, task in tree["other_tasks"].items()
        }
    return whole


def _whole_part(part: Any, where: str, folder: Path) -> Tree:
    part = {"extends": part} if isinstance(part, str) else part
    if not isinstance(part, dict):
        accepted = f"the path of a config file, or a mapping of {', '.join(('extends', *AXES))}"
        raise ConfigError(f"{where}: got {in_yaml(part)}, accepted is {accepted}")
    own = with_absolute_paths({key: value for key, value in part.items() if key != "extends"}, folder)
    if isinstance(own.get("grid"), dict):
        own["grid"] = {key: _with_absolute_values(key, values, folder) for key, values in flat(own["grid"])}
    parent = part.get("extends")
    if parent is None:
        return own
    if not isinstance(parent, str):
        raise ConfigError(f"{where}.extends: got {in_yaml(parent)}, accepted is the path of a YAML file")
    inherited = {
        key: value for key, value in read_tree(Path(absolute_file(parent, folder))).items() if key not in OUTSIDE
    }
    if isinstance(inherited.get("space"), dict):  # whose seed a run's own file has, asked for or not
        inherited["space"] = {key: value for key, value in inherited["space"].items() if key != "seed"}
    return merge(inherited, own)


def _with_absolute_values(key: str, values: Any, folder: Path) -> Any:
    if not isinstance(values, list):
        return values
    trees = (with_absolute_paths(nested(key, value), folder) for value in values)
    return [_at(tree, key) for tree in trees]


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree


def _what_trains(config: Config) -> Tree:
    """All of a config that its training depends on, equal for configs that train alike, as far as can be seen."""
    space = config.space.model_copy(update={"units": config.units})
    used = {"space": space, "method": config.method.as_used, "optimizer": config.optimizer.as_used}
    return config.model_copy(update=used).model_dump(exclude=UNUSED)


def _differences(config: Config, reference: Config) -> Iterator[tuple[str, Any, Any]]:
    """Where the shared fields of a config are not those of the other: the path and both values."""
    mine, theirs = (dict(flat(each.model_dump(mode="json"))) for each in (config, reference))
    for path in chain(mine, theirs):
        shared = any(path == field or path.startswith(f"{field}.") for field in SHARED)
        if shared and path not in OWN and mine.get(path) != theirs.get(path):
            yield path, mine.get(path), theirs.get(path)
