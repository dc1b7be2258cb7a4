"""A run on somebody else's machines: its config and files as a Ray job, the job's log, and how it ended."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient

from es_engine.config import Config
from es_engine.config.loading import with_placed_files
from es_engine.config.yaml_text import dump

GIB = 1 << 30
MOST_BYTES = GIB // 2
"""What Ray takes as the files of a job."""
PATIENCE_S = 120.0
TICK_S = 2.0
LOST = (aiohttp.ClientError, requests.RequestException, RuntimeError, TimeoutError)
"""What Ray's client raises when the server is gone, or does not know what it is asked."""
SUMMARY = "es_engine_summary"
NOT_SENT = shutil.ignore_patterns(".git", ".gitignore", ".rayignore")  # the last two would keep others from being sent


@dataclass(frozen=True, slots=True)
class Ending:
    """How a job ended; `summary` is what `es-engine train --summary` ends with, None where it did not come so far, and
    `message` is what Ray says of a job that has no exit code of its own."""

    exit_code: int
    summary: dict[str, Any] | None = None
    message: str = ""


def summary_line(summary: dict[str, Any]) -> str:
    """A run's summary as the line of a log that `Job.follow` recognises."""
    return json.dumps({SUMMARY: summary})


def submit(config: Config, address: str, run_dir: str | None = None, on_cluster: Collection[str] = ()) -> Job:
    """Send a run, with the files that its config names, to the cluster whose job server is at `address`.

    `run_dir` is a folder of the cluster's head, by default ~/runs/NAME; the files and folders in `on_cluster` are on
    every node already, at the same paths. Raises ValueError for files that cannot travel and where no job server
    answers.
    """
    entrypoint = _entrypoint(config, run_dir)
    with tempfile.TemporaryDirectory() as name:
        pack(config, Path(name), on_cluster)
        client = _connect(address)
        try:
            job = client.submit_job(
                entrypoint=entrypoint, runtime_env={"working_dir": name}, metadata={"es_engine_run": config.name}
            )
        except RuntimeError as error:
            raise ValueError(f"--address: {address} does not take the job: {error}") from error
    return Job(client, address, job)


def pack(config: Config, folder: Path, on_cluster: Collection[str] = ()) -> None:
    """Write a config for the cluster that it is run on, and copies of the files it names, into a folder.

    Raises ValueError if a file is not there, or if there is more of them than Ray takes.
    """
    there = [os.path.abspath(name) for name in on_cluster]
    places: dict[str, str] = {}

    def place(name: str) -> str:
        if not os.path.isabs(name) or any(Path(name).is_relative_to(other) for other in there):
            return name
        return places.setdefault(name, f"./files/{len(places)}/{os.path.basename(name)}")

    on_its_cluster = config.model_copy(update={"pool": config.pool.model_copy(update={"address": "auto"})})
    tree = with_placed_files(on_its_cluster.model_dump(mode="json"), place)
    _refuse_what_cannot_travel(places)
    for source, target in places.items():
        _copy(Path(source), folder / target)
    (folder / "config.yaml").write_text(dump(tree))


@dataclass(slots=True)
class Job:
    """A job of a cluster."""

    client: JobSubmissionClient
    address: str
    id: str
    _lines: int = field(default=0, init=False)
    _summary: dict[str, Any] | None = field(default=None, init=False)

    def follow(self, write: Callable[[str], None]) -> Ending:
        """Hand each line of the log to `write` as it comes, until the job ends.

        A connection that breaks is made again, and a line says so. Raises ValueError if the server has not answered for
        minutes; the job may go on all the same.
        """
        last_words = False
        while True:
            try:
                rest = asyncio.run(self._read_log(write))
                whole = True
            except LOST as error:
                rest, whole = "", last_words
                write(f"es-engine: the log broke off ({error or type(error).__name__})")
            info = self._info()
            if info.status.is_terminal() and whole:
                if rest:  # of a driver that was killed in the middle of a line
                    self._take(rest, write)
                if info.driver_exit_code is None:
                    return Ending(1, self._summary, info.message or info.status.value)
                return Ending(info.driver_exit_code, self._summary)
            last_words = info.status.is_terminal()  # the rest of a log that broke off is asked for once more
            time.sleep(TICK_S)

    def _info(self) -> JobDetails:
        """What the server says of the job, as soon as it says something."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                return self.client.get_job_info(self.id)
            except LOST as error:
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"--address: {self.address} has not answered for {PATIENCE_S:.0f} s ({error}); "
                        f"job {self.id} may go on"
                    ) from error
            time.sleep(TICK_S)

    async def _read_log(self, write: Callable[[str], None]) -> str:
        """Hand on the lines that no connection before this one brought; a log is told from its beginning each time.
        What comes back is the beginning of a line that has no end yet."""
        number, partial = 0, ""
        async for text in self.client.tail_job_logs(self.id):
            *lines, partial = (partial + text).split("\n")
            for line in lines:
                number += 1
                if number > self._lines:
                    self._lines = number
                    self._take(line, write)
        return partial

    def _take(self, line: str, write: Callable[[str], None]) -> None:
        if line.startswith(f'{{"{SUMMARY}": '):
            self._summary = json.loads(line)[SUMMARY]
        else:
            write(line)


def _entrypoint(config: Config, run_dir: str | None) -> str:
    """The job's command line, which a shell on the head reads. Raises ValueError."""
    if run_dir is not None and not os.path.isabs(run_dir):  # Ray removes the folder that a job starts in
        raise ValueError(f"--run-dir: got {run_dir}, accepted is an absolute path on the cluster's head")
    folder = f"~/runs/{config.name}" if run_dir is None else shlex.quote(run_dir)
    return f"es-engine train config.yaml --run-dir {folder} --summary"


def _connect(address: str) -> JobSubmissionClient:
    if not address.startswith(("http://", "https://")):
        raise ValueError(f"--address: got {address}, accepted is the URL of a job server, such as http://HEAD:8265")
    if "@" in urlsplit(address).netloc:  # it is told again, here and in logs
        raise ValueError("--address: it holds a name or a password; give the cluster's token in RAY_AUTH_TOKEN")
    for name in ("ray", *(kind.__module__ for kind in JobSubmissionClient.__mro__)):  # modules with levels of their own
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray prefers it, and then RAY_ADDRESS, to what it is given
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise ValueError(
            f"--address: {address} asks for the cluster's token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
        ) from error
    except (ConnectionError, RuntimeError, requests.RequestException) as error:
        raise ValueError(
            f"--address: no Ray job server answers at {address}; the cluster's head needs ray[default] and an open "
            "port, 8265 unless it was given another"
        ) from error


def _refuse_what_cannot_travel(names: Collection[str]) -> None:
    sizes = {}
    for name in names:
        if not os.path.exists(name):
            raise ValueError(f"{name}: not on this machine; if every node has it there, add --on-cluster {name}")
        sizes[name] = _bytes(Path(name))
    if sum(sizes.values()) >= MOST_BYTES:
        largest = max(sizes, key=lambda name: sizes[name])
        raise ValueError(
            f"{largest}: {sizes[largest] / GIB:.2f} GiB, and all files of a job may be less than {MOST_BYTES / GIB} "
            f"GiB; put it on every node at the same path and add --on-cluster {largest}, or name a model by its hub id"
        )


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in _files(path))


def _files(path: Path) -> Iterator[Path]:
    return (file for file in path.rglob("*") if file.is_file()) if path.is_dir() else iter([path])


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=NOT_SENT)
    else:
        shutil.copyfile(source, target)
