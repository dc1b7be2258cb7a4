"""The data sets that configs name, and whether what a run is made of is still what it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from es_engine.config import Config
from es_engine.config.loading import verifier_file
from rewards.problems import fingerprint

Fingerprints = dict[str, str]
"""Hashes of what comes from outside by what it is called in the config, such as the name of a file."""


def data_fingerprints(config: Config) -> Fingerprints:
    """Of the files, folders and hub data sets that a config without stages takes problems, demonstrations and
    preferences from. Raises ValueError, naming the field, for one that is not there."""
    return {source: fingerprint(source, field) for source, field in sorted({*_sources(config)})}


def verifier_fingerprints(config: Config) -> Fingerprints:
    """Of the files, alone, in which the verifiers, or the environment, of a config's task are; one that is not there is
    for whoever loads it to tell."""
    task = config.task
    parts = (getattr(task, "reward", None) or {}).values()
    names = [getattr(task, "verifier", None), getattr(task, "environment", None), *(part.verifier for part in parts)]
    files = {file for name in names if name is not None and (file := verifier_file(name)) is not None}
    return {file: fingerprint(file, "task.verifier") for file in sorted(files) if Path(file).is_file()}


def refuse_changed(known: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raises ValueError, naming it, for what is another thing now than it was, as far as that is known."""
    for source, found in now.items():
        if known.get(source, found) != found:
            raise ValueError(
                f"{source} has changed since this was begun, which can go on with the same alone; "
                "put it back as it was, or begin anew in another folder"
            )


def _sources(config: Config) -> Iterator[tuple[str, str]]:
    """Names of data sets and the fields that have them."""
    for axis, part in (("task", config.task), ("method", config.method)):
        for name in ("data", "heldout_data"):
            source = getattr(part, name, None)
            if source is not None:
                yield source, f"{axis}.{name}"
