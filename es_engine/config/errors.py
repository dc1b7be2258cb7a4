"""Validation errors as sentences: the dotted field, what was given, what is accepted."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from es_engine.config.base import MAPPING, PLAIN, ConfigError, in_yaml
from es_engine.config.reflection import accepted_by, kinds_of, models_of, models_of_values, one_of


def as_config_error(
    error: ValidationError, root: type[BaseModel], data: Mapping[str, Any], copies: Collection[str] = ()
) -> ConfigError:
    """One sentence a line for each field of `data` that `root` refuses; at the dotted names of `copies` it holds again
    what it holds elsewhere, of which nothing is said twice."""
    sentences: dict[str, str] = {}
    for detail in error.errors():
        path, sentence = _explain(detail, root, data)
        if not any(f"{path}.".startswith(f"{copy}.") for copy in copies):
            sentences.setdefault(path, sentence)
    return ConfigError("\n".join(sentences.values()))


def _explain(detail: Mapping[str, Any], root: type[BaseModel], data: Mapping[str, Any]) -> tuple[str, str]:
    """The dotted path of the field that is at fault and the sentence about it."""
    if detail["loc"][-1:] == ("[key]",):  # of a mapping by name
        path = ".".join(map(str, detail["loc"][:-2]))
        return path, f"{path}: got the name {in_yaml(detail['input'])}, accepted is text"
    keys, model, info = _locate(detail["loc"], root)
    path = ".".join(key if key.isidentifier() or key.isdecimal() else in_yaml(key) for key in keys)
    if detail["type"] == "value_error":
        message = str(detail["ctx"]["error"])
        return path, f"{path}.{message}" if path else message
    if info is None:
        return path, _unknown_key(path, keys[-1], model)
    if detail["type"] == "missing" and detail["loc"][-1] == keys[-1]:  # not an item missing from a list
        return path, f"{path}: missing, accepted is {accepted_by(info)}"
    given: Any = data
    for key in keys:
        given = given[int(key) if isinstance(given, list) else key]
    if detail["type"] == "union_tag_invalid":
        models = models_of(info.annotation) or models_of_values(info.annotation)
        kinds = one_of(kinds_of(*models))
        return path, f"{path}.kind: got {in_yaml(given['kind'])}, accepted is {kinds}"
    return path, f"{path}: got {in_yaml(given)}, accepted is {accepted_by(info)}"


def _locate(loc: tuple[int | str, ...], root: type[BaseModel]) -> tuple[list[str], type[BaseModel], FieldInfo | None]:
    """Follow pydantic's location to a field of plain value, past the kinds it names on the way.

    Returns the field's keys, the model it is in and its definition, None for a field the model does not have.
    """
    keys: list[str] = []
    model, info = root, None
    models: tuple[type[BaseModel], ...] = (root,)
    values: tuple[type[BaseModel], ...] = ()
    for part in loc:
        if values:  # this part is the name of one of a mapping, or the place in a list
            keys.append(str(part))
            models, values = values, ()
            continue
        if part == PLAIN or not models:
            break
        if part == MAPPING:
            continue
        if len(models) > 1:
            models = tuple(choice for choice in models if part in kinds_of(choice))
            continue
        model = models[0]
        info = model.model_fields.get(str(part))
        keys.append(str(part))
        models = models_of(info.annotation) if info else ()
        values = models_of_values(info.annotation) if info else ()
    return keys, model, info


def _unknown_key(path: str, key: str, model: type[BaseModel]) -> str:
    accepted = list(model.model_fields)
    nearest = get_close_matches(key, accepted, n=1)
    hint = f", perhaps {nearest[0]}" if nearest else ""
    kinds = kinds_of(model)
    kind = f" for kind {one_of(kinds)}" if kinds else ""
    return f"{path}: unknown key{hint}; accepted{kind} are {', '.join(accepted)}"
