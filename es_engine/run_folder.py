"""The folder that a run leaves behind: what is in it, how each thing is written so that a crash cannot spoil it, and
what of somebody else's is not believed."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from es_engine.config import Config, dump_config, load_resolved
from es_engine.ledger import Ledger

if TYPE_CHECKING:  # torch takes seconds to import, and who only reads a run's figures needs none
    import torch

KEPT_CHECKPOINTS = 2
CHECKPOINT = re.compile("step-([0-9]{6,15})")


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of one run."""

    path: Path

    @classmethod
    def existing(cls, path: Path) -> RunFolder:
        """That of a run that is there already. Raises ValueError if the folder holds no run, or leads elsewhere."""
        folder = cls(path)
        folder._refuse_none()
        refuse_ways_out(path)
        return folder

    @property
    def config_file(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def ledger_file(self) -> Path:
        """The history."""
        return self.path / "ledger.jsonl"

    @property
    def eval_file(self) -> Path:
        """Held-out evaluations, one a line."""
        return self.path / "eval.jsonl"

    @property
    def adapter(self) -> Path:
        """The final PEFT adapter."""
        return self.path / "adapter"

    @property
    def best(self) -> Path:
        """The PEFT adapter that was best by held-out reward."""
        return self.path / "best"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints, one folder a step."""
        return self.path / "checkpoints"

    @property
    def diverged_file(self) -> Path:
        """Why a run that diverged went no further; left by a comparison, which will not have it go on."""
        return self.path / "diverged.json"

    @property
    def report(self) -> Path:
        """The page of curves and samples that a finished run ends with."""
        return self.path / "report.html"

    def samples_file(self, step: int) -> Path:
        """Held-out completions with their scores after `step` steps."""
        return self.path / "samples" / f"step-{step:06d}.jsonl"

    def create(self, config: Config) -> None:
        """Make the folder and write the config. Raises ValueError if it exists."""
        self.refuse_existing()
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.config_file, dump_config(config))

    def refuse_existing(self) -> None:
        """Raises ValueError if there is a run, or anything else, in the folder already; a config that was cut off while
        it was written is nothing."""
        refuse_no_place(self.path)
        if not is_free(self.path, self.config_file.name):
            raise ValueError(f"{self.path}: this run folder exists already; resume it, or give another with --run-dir")

    def load_config(self) -> Config:
        """The run's config. Raises ValueError if the folder holds no run."""
        self._refuse_none()
        return load_resolved(self.config_file)

    def _refuse_none(self) -> None:
        if not self.config_file.is_file():
            raise ValueError(f"{self.path}: not a run folder (it has no config.yaml)")

    def open_ledger(self) -> Ledger:
        """The run's history so far."""
        return Ledger(self.ledger_file)

    def open_evaluations(self) -> Ledger:
        """The run's evaluations so far."""
        return Ledger(self.eval_file)

    def save_checkpoint(
        self, step: int, tensors: Mapping[str, torch.Tensor], lasting: Callable[[int], bool] = lambda _: False
    ) -> None:
        """Keep theta and the optimizer's state after `step` steps, the checkpoint before, those of lasting steps, and
        no more."""
        from safetensors.torch import save

        def write(folder: Path) -> None:
            # As bytes, because safetensors' own writing to a file hides the OSError of a full disk.
            data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
            (folder / "state.safetensors").write_bytes(data)

        write_folder(self.checkpoints / f"step-{step:06d}", write)
        for old in self._checkpoint_folders()[:-KEPT_CHECKPOINTS]:
            if not lasting(_step_of(old)):
                # On NFS a file that somebody reads, such as a backup, cannot be removed; the next call will do it.
                shutil.rmtree(old, ignore_errors=True)

    def load_checkpoints(self, most: int) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        """The readable checkpoints of at most `most` steps, the latest first: step and tensors."""
        for folder in reversed(self._checkpoint_folders()):
            step = _step_of(folder)
            if step <= most:
                try:
                    with safe_open(folder / "state.safetensors", framework="pt") as file:
                        # Copies: what it gives stays mapped to the file, and an optimizer keeps its state for good.
                        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
                except (SafetensorError, OSError):
                    continue  # damaged: an earlier one, or the ledger alone, gives the same theta
                yield step, tensors

    @property
    def last_checkpoint_time(self) -> float | None:
        """When the latest checkpoint was written, in seconds since the epoch; None if there is none."""
        folders = self._checkpoint_folders()
        return folders[-1].stat().st_mtime if folders else None

    @property
    def checkpoint_steps(self) -> list[int]:
        """The steps of which there are checkpoints, readable or not, in order."""
        return [_step_of(folder) for folder in self._checkpoint_folders()]

    def _checkpoint_folders(self) -> list[Path]:
        named = (path for path in self.checkpoints.glob("step-*") if CHECKPOINT.fullmatch(path.name))
        return sorted((path for path in named if path.is_dir()), key=_step_of)


def _step_of(checkpoint: Path) -> int:
    match = CHECKPOINT.fullmatch(checkpoint.name)
    assert match is not None
    return int(match[1])


def refuse_ways_out(folder: Path) -> None:
    """Raises ValueError, naming it, if there is anything in a folder but files, folders and links to these: whoever
    reads or writes in a folder that somebody else filled should neither get elsewhere nor wait for ever."""
    home = os.path.realpath(folder)
    for entry in _entries(folder):
        if entry.is_symlink():
            target = os.path.realpath(entry.path)
            if os.path.commonpath([home, target]) != home:
                raise ValueError(f"{entry.path}: a link out of {folder}; put what it names in its place")
        elif not (entry.is_file() or entry.is_dir()):
            raise ValueError(f"{entry.path}: neither a file nor a folder; remove it")


def _entries(folder: str | Path) -> Iterator[os.DirEntry[str]]:
    """Everything below a folder; what vanishes meanwhile, as checkpoints do while a run goes on, is left out."""
    folders = [os.fspath(folder)]
    while folders:
        try:
            entries = list(os.scandir(folders.pop()))
        except FileNotFoundError:
            continue
        yield from entries
        folders += [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]


def refuse_no_place(path: Path) -> None:
    """Raises ValueError, naming what is in the way, where neither file nor folder can be made at a path, whose folders
    need not be there yet."""
    place = path.absolute()
    try:
        there = place if place.is_dir() else next(parent for parent in place.parents if os.path.lexists(parent))
        os.lstat(place if there == place else _partial(place))
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; give another place") from error
    if not there.is_dir():
        raise ValueError(f"{path}: {there} is no folder, in which there could be another thing; give another place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{path}: {there} may not be written to; give another place")


def refuse_no_file(path: Path) -> None:
    """Raises ValueError where no file can be written, be it in place of one that is there."""
    refuse_no_place(path)
    _refuse_other(path)
    _refuse_other(_partial(path))


def _refuse_other(path: Path) -> None:
    if os.path.lexists(path) and not path.is_file():
        raise ValueError(f"{path}: exists and is no file; give the name of one")


def refuse_taken(folder: Path) -> None:
    """Raises ValueError where no new folder can be made: something is there already, or in the way."""
    refuse_no_place(folder)
    if folder.exists():
        raise ValueError(f"{folder}: exists already; give another folder")


def make_first_free(folder: Path) -> Path:
    """Make FOLDER, or if that is taken the first of FOLDER-2, FOLDER-3, ... that is not; which it was."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    later = (folder.with_name(f"{folder.name}-{number}") for number in count(2))
    return next(each for each in chain([folder], later) if _made(each))


def _made(folder: Path) -> bool:
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


def is_free(folder: Path, first: str) -> bool:
    """Can something be begun in a folder by writing a file `first`? It may be empty, or not there, or hold half of that
    file, which a crash left."""
    if not folder.exists():
        return True
    return folder.is_dir() and all(path.name == _partial(Path(first)).name for path in folder.iterdir())


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Replace a folder by what `write` puts into a new one: a crash at any instant leaves the old one or the new one,
    whole; where it falls between the two renames, the old one is called FOLDER.old until the next call.

    Raises OSError, and keeps the old one, where the disk takes no more.
    """
    partial, old = _partial(folder), folder.with_name(folder.name + ".old")
    if old.exists() and not folder.exists():
        old.rename(folder)
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write(partial)
        for path in partial.iterdir():
            _sync(path)
        _sync(partial)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replace a file by `text`; whoever looks sees the old one or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    partial.unlink(missing_ok=True)
    try:
        with partial.open("x", encoding="utf-8") as file:  # a new one, where a link might lie
            file.write(text)
        _sync(partial)
        partial.rename(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace a file by one JSON object a line."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def _partial(path: Path) -> Path:
    """Where a file or folder is until it is whole."""
    return path.with_name(path.name + ".partial")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
