"""The data sets that configs name, and whether each is still what it was when a run began."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from es_engine.config import Config
from rewards.problems import fingerprint

Fingerprints = dict[str, str]
"""Hashes of data sets by their names in the config: files, folders and hub data sets."""


def fingerprints(configs: Iterable[Config]) -> Fingerprints:
    """Those of all that the configs take problems, demonstrations or preferences from. Raises ValueError for one that
    is not there."""
    return {source: fingerprint(source, field) for source, field in sorted({*_sources(configs)})}


def refuse_changed(known: Mapping[str, str], now: Mapping[str, str], where: object, what: str) -> None:
    """Raises ValueError, naming it, for a data set that is not what it was when `what` in `where` began."""
    for source, found in now.items():
        if known.get(source) != found:
            raise ValueError(
                f"{where}: {source} is not what it was when the {what} began, which can only go on with the same "
                "data; put the old one back, or begin another"
            )


def _sources(configs: Iterable[Config]) -> Iterator[tuple[str, str]]:
    """Names of data sets and the fields that have them."""
    for config in configs:
        for stage in config.by_stage:
            for axis, part in (("task", stage.task), ("method", stage.method)):
                for name in ("data", "heldout_data"):
                    source = getattr(part, name, None)
                    if source is not None:
                        yield source, f"{axis}.{name}"
