"""YAML as the configuration reads and writes it: the core schema of YAML 1.2 rather than PyYAML's 1.1.

So 1e-3 is a number (text in PyYAML), while on, yes, 1:30 and 2024-01-01 are text (a truth value, ninety, a date). A key
that occurs twice is an error, and so are aliases that make a few lines into more than anybody writes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from itertools import chain
from typing import Any

import yaml

from es_engine.config.base import ConfigError

MOST_VALUES = 100_000
"""Keys, items and plain values of a text, those that aliases repeat counted each time."""

_DIGITS = r"[-+]?(?:0|[1-9][0-9_]*)"
_EXPONENT = r"[eE][-+]?[0-9]+"
_SCALARS = (
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", "true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", _DIGITS, list("-+0123456789")),
    ("float", rf"{_DIGITS}\.[0-9]*(?:{_EXPONENT})?|{_DIGITS}{_EXPONENT}", list("-+0123456789")),
    ("float", rf"[-+]?\.[0-9]+(?:{_EXPONENT})?", list("-+.")),
    ("merge", "<<", ["<"]),
)


class _Loader(yaml.SafeLoader):
    """Reads YAML 1.2's core schema; refuses a key that occurs twice, and too many values."""

    def construct_document(self, node: yaml.Node) -> Any:
        if _values(node, {}) > MOST_VALUES:
            raise yaml.YAMLError(f"more than {MOST_VALUES} values, or an alias of what it is in")
        return super().construct_document(node)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"the key {key.value} occurs twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return node


def _values(node: yaml.Node, known: dict[int, float]) -> float:
    """How many values a node has; infinitely many if it is an item of its own. `known` are those of nodes by id."""
    if id(node) not in known:
        known[id(node)] = math.inf  # until it is counted
        known[id(node)] = 1 + sum(_values(each, known) for each in _items(node))
    return known[id(node)]


def _items(node: yaml.Node) -> Iterable[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return chain.from_iterable(node.value)
    return node.value if isinstance(node, yaml.SequenceNode) else ()


class _Dumper(yaml.SafeDumper):
    """Quotes whatever YAML 1.1 or 1.2 would not read as text."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML's other styles fold line breaks, and lose the less common of them.
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent_text)
_Loader.yaml_implicit_resolvers = {}  # none of YAML 1.1
for _name, _pattern, _first in _SCALARS:
    _anchored = re.compile(rf"(?:{_pattern})\Z")
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _anchored, _first)
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _anchored, _first)


def parse(text: str, where: str) -> Any:
    """The value of a YAML text. Raises ConfigError, naming `where` and the line, for text that is not YAML."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{where}{line}: not valid YAML ({error.problem})") from error
    except RecursionError as error:
        raise ConfigError(f"{where}: not valid YAML (too many lists and mappings within one another)") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML ({str(error).splitlines()[0]})") from error
    except (AttributeError, LookupError, ValueError) as error:  # of text that is no value of the type that it claims
        raise ConfigError(f"{where}: not valid YAML (a value that is none of its type)") from error


def dump(value: Any) -> str:
    """A value as YAML text that `parse` reads back as the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
