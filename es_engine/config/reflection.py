"""What the models say of themselves: their kinds, their fields and, in words, what each field accepts."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from es_engine.config.base import in_yaml

_BOUNDS = {Ge: (">=", "ge"), Gt: (">", "gt"), Le: ("<=", "le"), Lt: ("<", "lt")}
_PLAIN = {bool: "true or false", int: "an integer", float: "a number", str: "text", NoneType: "null"}


@dataclass(frozen=True, slots=True)
class FieldDoc:
    """One field: its dotted name, the kind it belongs to (None where an axis has none) and its prose."""

    name: str
    kind: str | None
    accepted: str
    default: str | None
    prose: str


def models_of(annotation: Any) -> tuple[type[BaseModel], ...]:
    """The models a field may hold, the default one first; empty for a field that holds a plain value."""
    if get_origin(annotation) is Annotated:
        return models_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(model for arm in get_args(annotation) for model in models_of(arm))
    return (annotation,) if isinstance(annotation, type) and issubclass(annotation, BaseModel) else ()


def models_of_values(annotation: Any) -> tuple[type[BaseModel], ...]:
    """The models that the values of a mapping or the items of a list may be; empty for a field of another type."""
    if get_origin(annotation) is Annotated:
        return models_of_values(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(model for arm in get_args(annotation) for model in models_of_values(arm))
    if get_origin(annotation) is tuple:
        return models_of(get_args(annotation)[0])
    return models_of(get_args(annotation)[1]) if get_origin(annotation) is dict else ()


def kinds_of(*models: type[BaseModel]) -> list[str]:
    """The kinds that models are chosen by, the default one first; empty where there are none."""
    fields = [model.model_fields["kind"] for model in models if "kind" in model.model_fields]
    return [kind for field in fields for kind in get_args(field.annotation)]


def default_kinds(root: type[BaseModel]) -> dict[str, str]:
    """For each field that is chosen by kind, at any depth: the kind that is meant where none is named."""
    kinds: dict[str, str] = {}
    for name, info in root.model_fields.items():
        models = models_of(info.annotation)
        for model in models:
            kinds |= default_kinds(model)
        if kinds_of(*models):
            kinds[name] = kinds_of(*models)[0]
    return kinds


def field_docs(root: type[BaseModel]) -> Iterator[FieldDoc]:
    """Every field on the axes of a model, depth first, in the order of definition; an axis that comes again within
    another is not gone through again."""
    axes = {axis for info in root.model_fields.values() for axis in models_of(info.annotation)}
    return _field_docs(root, axes, "", None)


def _field_docs(
    model: type[BaseModel], axes: Collection[type[BaseModel]], prefix: str, kind: str | None
) -> Iterator[FieldDoc]:
    for name, info in model.model_fields.items():
        models, values = models_of(info.annotation), models_of_values(info.annotation)
        is_axis = (models or values) and not prefix
        if not is_axis:
            yield FieldDoc(prefix + name, kind, accepted_by(info), _default(info), info.description or "")
        for inner in models:
            if not prefix or inner not in axes:
                # A schedule belongs to the kind of its axis; its own kinds share all fields.
                inner_kind = kind or next(iter(kinds_of(inner)), None)
                yield from _field_docs(inner, axes, f"{prefix}{name}.", inner_kind)
        for inner in values:
            place = "N" if get_origin(info.annotation) is tuple else "NAME"
            yield from _field_docs(inner, axes, f"{prefix}{name}.{place}.", kind)


def _default(info: FieldInfo) -> str | None:
    if info.is_required():
        return None
    return in_yaml(info.default.model_dump() if isinstance(info.default, BaseModel) else info.default)


def accepted_by(info: FieldInfo) -> str:
    """What a field accepts, in words."""
    return _accepted(info.annotation, info.metadata)


def _accepted(annotation: Any, metadata: list[Any]) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _accepted(args[0], [*metadata, *(item for extra in args[1:] for item in _constraints(extra))])
    models = models_of(annotation)
    if origin in (Union, UnionType):
        plain = sorted((arm for arm in args if not models_of(arm)), key=lambda arm: arm is not NoneType)
        return " or ".join([_accepted(arm, []) for arm in plain] + ([_accepted_mapping(models)] if models else []))
    if models:
        return _accepted_mapping(models)
    if origin is Literal:
        return one_of([str(value) for value in args])
    filled = any(isinstance(item, MinLen) for item in metadata)
    if origin is tuple:
        size = "a list" if args[-1] is Ellipsis else f"a list of {len(args)}"
        return f"{'a non-empty list' if filled else size}, each item {_accepted(args[0], [])}"
    if origin is dict:
        return f"a mapping, each value {_accepted(args[1], [])}" if models_of(args[1]) else "a mapping"
    return f"{'non-empty ' if filled else ''}{_PLAIN[annotation]}{_bounds(metadata)}"


def _accepted_mapping(models: tuple[type[BaseModel], ...]) -> str:
    kinds = kinds_of(*models)
    return f"a mapping of kind {one_of(kinds)}" if kinds else f"a mapping of {', '.join(models[0].model_fields)}"


def _constraints(extra: Any) -> list[Any]:
    return extra.metadata if isinstance(extra, FieldInfo) else [extra]


def _bounds(metadata: list[Any]) -> str:
    parts = []
    for item in metadata:
        if type(item) in _BOUNDS:
            symbol, attribute = _BOUNDS[type(item)]
            parts.append(f" {symbol} {getattr(item, attribute)}")
        elif pattern := getattr(item, "pattern", None):
            parts.append(f" that matches {pattern}")
    return " and".join(parts)


def one_of(names: list[str]) -> str:
    """`a`, `a or b`, `a, b or c`."""
    *rest, last = names
    return f"{', '.join(rest)} or {last}" if rest else last
