"""From YAML files and overrides to a Config and back."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from es_engine.config import yaml_text
from es_engine.config.base import ConfigError, ConfigModel, in_yaml
from es_engine.config.errors import as_config_error
from es_engine.config.reflection import default_kinds, kinds_of, models_of, one_of
from es_engine.config.root import Config
from es_engine.config.stage import StageConfig
from es_engine.config.tasks import TaskConfig, TaskConfigModel
from rewards.base import DIALECTS

MOST_BYTES = 1 << 18
"""Of a config file."""

Tree = dict[str, Any]
Place = Callable[[str], str]  # from the name of a file to where it is


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file, after `extends:` and overrides such as `method.population=64`.

    A relative path to a file is looked for beside the YAML file that names it, then in the current directory, where
    those of overrides start. Raises ConfigError.
    """
    tree = merge(read_tree(Path(path)), override_tree(overrides))
    _refuse_idle(overrides, tree.get("stages"))
    return parse_config(tree)


def load_resolved(path: Path) -> Config:
    """The configuration of a file as `dump_config` writes it, and nothing beside it: such a file extends no other.
    Raises ConfigError."""
    tree = yaml_text.parse(read_text(path), str(path))
    return parse_config(with_absolute_paths(tree, path.parent) if isinstance(tree, dict) else tree)


def load_task(target: str, overrides: Sequence[str] = ()) -> TaskConfigModel:
    """The task of a config file, or one of a kind with its defaults; overrides such as `task.seed=1`. Raises
    ConfigError."""
    kinds = task_kinds()
    if target not in kinds:
        if not os.path.exists(target):
            raise ConfigError(f"task: got {in_yaml(target)}, accepted is {one_of(list(kinds))}, or a config file")
        return load_config(target, overrides).task
    tree = with_absolute_paths(merge({"task": {"kind": target}}, override_tree(overrides)), Path.cwd())
    try:
        return _TaskAlone.model_validate(tree).task
    except ValidationError as error:
        raise as_config_error(error, _TaskAlone, tree) from error


def task_kinds() -> dict[str, type[TaskConfigModel]]:
    """The config of each task by its kind."""
    return {kind: model for model in models_of(TaskConfig) for kind in kinds_of(model)}  # type: ignore[misc]


class _TaskAlone(ConfigModel):
    task: TaskConfig


def parse_config(data: Mapping[str, Any]) -> Config:
    """The configuration of a mapping; relative paths start in the current directory. Raises ConfigError."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"the configuration: got {in_yaml(data)}, accepted is a mapping of {', '.join(AXES)}")
    resolved, copies = _with_whole_stages(with_absolute_paths(dict(data), Path.cwd()))
    try:
        return Config.model_validate(resolved)
    except ValidationError as error:
        raise as_config_error(error, Config, resolved, copies) from error


def dump_config(config: Config) -> str:
    """YAML with every field; loads as an equal Config from any folder."""
    return yaml_text.dump(config.model_dump(mode="json"))


AXES = tuple(Config.model_fields)
_DEFAULT_KINDS = default_kinds(Config)


def read_tree(path: Path, children: tuple[Path, ...] = ()) -> Tree:
    """The mapping of a file, laid over the one it extends; `children` are the files that led here. Raises
    ConfigError."""
    path = Path(os.path.abspath(path))
    if path in children:
        raise ConfigError(f"{children[-1]}: extends {path}, which extends it in turn")
    tree = yaml_text.parse(read_text(path), str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: got {in_yaml(tree)}, accepted is a mapping of {', '.join(('extends', *AXES))}")
    parent = tree.pop("extends", None)
    tree = with_absolute_paths(tree, path.parent)
    if parent is None:
        return tree
    if not isinstance(parent, str):
        raise ConfigError(f"{path}: extends: got {in_yaml(parent)}, accepted is the path of a YAML file")
    return merge(read_tree(path.parent / parent, (*children, path)), tree)


def read_text(path: Path) -> str:
    """What a config file holds. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the config file ({error.strerror})") from error
    if len(data) > MOST_BYTES:
        raise ConfigError(f"{path}: the config file is larger than {MOST_BYTES} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: the config file is not UTF-8 text") from error


def merge(parent: Tree, child: Tree, default_kind: str | None = None) -> Tree:
    """`child` over `parent`, mapping by mapping; a new kind drops the parent's keys, which belong to the old one."""
    if "kind" in child and child["kind"] != parent.get("kind", default_kind):
        parent = {}
    merged = dict(parent)
    for key, value in child.items():
        below = merged.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            merged[key] = merge(below, value, _DEFAULT_KINDS.get(key))
        else:
            merged[key] = value
    return merged


def override_tree(overrides: Sequence[str]) -> Tree:
    """`a.b=value` as {"a": {"b": value}}, all overrides together; values are YAML."""
    tree: Tree = {}
    for override in overrides:
        name, equals, value = override.partition("=")
        if not (name and equals):
            raise ConfigError(f"override {override}: accepted is KEY=VALUE, such as method.population=64")
        *parents, last = name.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise ConfigError(f"override {override}: an earlier override gives {key} a value of its own")
        node[last] = yaml_text.parse(value, f"override {override}")
    return tree


def _refuse_idle(overrides: Sequence[str], stages: Any) -> None:
    """Raises ConfigError for an override of what every stage has of its own."""
    for override in overrides:
        axis = re.split(r"[.=]", override, maxsplit=1)[0]
        if every_stage_has(axis, stages):
            raise ConfigError(f"override {override}: every stage has {axis} of its own, where the config file gives it")


def every_stage_has(axis: str, stages: Any) -> bool:
    """Whether there are stages and each has this axis of its own, so that the run's is not used."""
    own = isinstance(stages, list) and all(isinstance(stage, dict) and axis in stage for stage in stages)
    return bool(stages) and own and axis in StageConfig.model_fields


def nested(name: str, value: Any) -> Tree:
    """The mapping of mappings in which a dotted name has this value. Raises ConfigError for a name with an empty
    part."""
    *outer, last = name.split(".")
    if not all((*outer, last)):
        raise ConfigError(f"{name}: a name with an empty part, accepted is a dotted field such as optimizer.lr")
    tree: Tree = {last: value}
    for part in reversed(outer):
        tree = {part: tree}
    return tree


def _with_whole_stages(tree: Tree) -> tuple[Tree, set[str]]:
    """The same mapping with the axes that a stage leaves out taken from the run, and those that the run leaves out from
    its first stage; and the dotted names of all these copies."""
    stages = tree.get("stages")
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        return tree, set()
    axes = tuple(StageConfig.model_fields)
    own = {axis: tree[axis] for axis in axes if axis in tree}
    copies = {f"stages.{number}.{axis}" for number, stage in enumerate(stages) for axis in own.keys() - stage.keys()}
    missing = {axis: stages[0][axis] for axis in axes if axis in stages[0] and axis not in own}
    return {**tree, **missing, "stages": [own | stage for stage in stages]}, copies | missing.keys()


def with_absolute_paths(tree: Tree, folder: Path) -> Tree:
    """The same mapping with the paths of files absolute, each found in `folder` or else in the current directory."""
    return with_placed_files(tree, lambda name: absolute_file(name, folder))


def with_placed_files(tree: Tree, place: Place) -> Tree:
    """The same mapping with `place` applied to the name of every file in it."""
    for keys, placed in _PATHS.items():
        tree = _with_placed_file(tree, keys, placed, place)
    if isinstance(tree.get("stages"), list):
        stages = [with_placed_files(each, place) if isinstance(each, dict) else each for each in tree["stages"]]
        tree = {**tree, "stages": stages}
    task = tree.get("task")
    if isinstance(task, dict) and isinstance(task.get("reward"), dict):
        parts = {name: _part(part, place) for name, part in task["reward"].items()}
        tree = {**tree, "task": {**task, "reward": parts}}
    return tree


def _with_placed_file(tree: Tree, keys: tuple[str, ...], placed: _Placed, place: Place) -> Tree:
    """The same mapping with the file at nested keys placed, where there is one."""
    first, *rest = keys
    found = tree.get(first)
    if rest and isinstance(found, dict):
        return {**tree, first: _with_placed_file(found, tuple(rest), placed, place)}
    if rest or not isinstance(found, str) or tree.get("kind") == "tiny":  # whose source is no place
        return tree
    return {**tree, first: placed(found, place)}


def _part(part: Any, place: Place) -> Any:
    """A part of a reward, with the file of its verifier, or of its reward model, placed."""
    if not isinstance(part, dict) or not isinstance(part.get("verifier"), str):
        return part
    options = part.get("options")
    if part["verifier"] == "reward_model" and isinstance(options, dict) and isinstance(options.get("model"), str):
        part = {**part, "options": {**options, "model": _model_source(options["model"], place)}}
    return {**part, "verifier": _verifier(part["verifier"], place)}


def absolute_file(name: str, folder: Path) -> str:
    """The absolute path of a file that is looked for in `folder`, then in the current directory."""
    path = Path(os.path.expanduser(name))  # which leaves the home of nobody as it is, where that of Path raises
    return os.path.abspath(folder / path if os.path.exists(folder / path) else path)


def _file(name: str, place: Place) -> str:
    return place(name)


def _data(name: str, place: Place) -> str:
    """A data set on a hub stays as it is."""
    return name if name.startswith("hub:") else place(name)


def _model_source(name: str, place: Place) -> str:
    """A hub id and a GGUF of a package stay as they are; both look like relative paths."""
    if name.startswith("package:"):
        return name
    is_path = name.endswith(".gguf") or name.startswith(("/", ".", "~"))
    path = place(name)
    return path if is_path or os.path.exists(path) else name


def verifier_file(name: str) -> str | None:
    """The file that a verifier's name has; None for a registered verifier and for that of a module."""
    match = _FILE_OF_VERIFIER.fullmatch(name)
    return match["path"] if match else None


def _verifier(name: str, place: Place) -> str:
    """Only path/to/file.py has a path; a registered verifier and package.module do not."""
    match = _FILE_OF_VERIFIER.fullmatch(name)
    return f"{match['dialect'] or ''}{place(match['path'])}{match['rest']}" if match else name


# The function may be left out behind a dialect's prefix only, but there is no other name that ends in .py.
_FILE_OF_VERIFIER = re.compile(
    rf"(?P<dialect>({'|'.join(DIALECTS)}):)?(?P<path>.+?\.py)(?P<rest>(:\w+)?(\(.*\))?)", re.S
)

_Placed = Callable[[str, Place], str]
_PATHS: dict[tuple[str, ...], _Placed] = {
    ("model", "source"): _model_source,
    ("model", "lessons", "data"): _data,
    ("model", "lessons", "heldout_data"): _data,
    ("method", "teacher", "model"): _model_source,
    ("method", "teacher", "adapter"): _file,
    ("space", "init"): _file,
    ("method", "data"): _data,
    ("task", "data"): _data,
    ("task", "heldout_data"): _data,
    ("task", "reward_model"): _model_source,
    ("task", "verifier"): _verifier,
    ("task", "environment"): _verifier,
}
