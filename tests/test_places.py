"""Where commands write: a place that cannot be is refused before any work, and nothing of before is written over."""

from __future__ import annotations

import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from command_line import command, refusal
from run_folders import comparison_of, write_run
from small_runs import SessionPool, small_config, train_here, write_rows

from es_engine import run_folder, session
from es_engine.config import dump_comparison, dump_config, load_config
from es_engine.run_folder import make_first_free, refuse_no_place, write_text

ES = {"kind": "es", "population": 4, "prompts": 2, "sigma": 0.1}


@pytest.fixture
def here(tmp_path: Path, random_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a finished run, configs, completions, and what may be in the way."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "made_up", comparison_of().final("es", {}, 1), accuracy=np.full((3, 4), 0.5))
    (tmp_path / "base.yaml").write_text(dump_config(small_config(random_llama, ES, budget={"generations": 1})))
    (tmp_path / "comparison.yaml").write_text(dump_comparison(comparison_of()))
    write_rows(tmp_path / "said.jsonl", [{"prompt": "p", "completion": "1", "numbers": [1, 2], "target": 3}])
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes").write_text("mine")
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    return tmp_path


COMMANDS: dict[str, list[str]] = {
    "score": ["countdown", "--in", "said.jsonl", "--out"],
    "report": ["made_up", "--no-png", "--out"],
    "eval": ["base.yaml", "--out"],
    "export": ["made_up", "--out"],
    "replay": ["made_up", "--step", "1", "--out"],
    "train": ["base.yaml", "--run-dir"],
    "compare": ["comparison.yaml", "--dir"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_place_that_cannot_be_is_refused_before_any_work(here: Path, name: str) -> None:
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    makes_file = name in ("score", "report")
    places = {
        "file/x": f"{here / 'file'} is no folder, in which there could be another thing; give another place",
        "file/x/y": f"{here / 'file'} is no folder, in which there could be another thing; give another place",
        "nowhere/x": f"{here / 'nowhere'} is no folder, in which there could be another thing; give another place",
        "/": "exists",
        "x" * 300: f"{os.strerror(errno.ENAMETOOLONG)}; give another place",
        "folder": "exists and is no file; give the name of one" if makes_file else "exists",
        **({} if makes_file else {"file": "exists"}),
    }
    for place, reason in places.items():
        with patch.object(session, "Pool", side_effect=AssertionError("no work should begin")):
            sentence = refusal(name, *COMMANDS[name], place)
        assert sentence.startswith(place)
        assert reason in sentence
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before


def test_a_folder_that_may_not_be_written_to_is_refused(here: Path) -> None:
    with patch.object(os, "access", lambda path, _mode: Path(path) != here / "folder"):  # the root may write anywhere
        sentence = refusal("score", *COMMANDS["score"], "folder/new/out.jsonl")
    assert sentence == f"folder/new/out.jsonl: {here / 'folder'} may not be written to; give another place"


def test_a_folder_that_is_there_may_lie_in_one_that_may_not_be_written_to(here: Path) -> None:
    """As a mounted one does."""
    with patch.object(os, "access", lambda path, _mode: Path(path) != here):
        refuse_no_place(here / "folder")
        with pytest.raises(ValueError, match="may not be written to"):
            refuse_no_place(here / "new")


def test_half_a_file_that_is_a_folder_is_refused(here: Path) -> None:
    (here / "out.jsonl.partial").mkdir()
    sentence = refusal("score", *COMMANDS["score"], "out.jsonl")
    assert sentence == "out.jsonl.partial: exists and is no file; give the name of one"


def test_who_comes_first_has_the_first_free_folder(tmp_path: Path) -> None:
    (tmp_path / "a-2").write_text("a file")
    (tmp_path / "a-4").symlink_to(tmp_path / "absent")
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda _: make_first_free(tmp_path / "a").name, range(32)))
    assert len(set(made)) == 32
    assert not {"a-2", "a-4"} & set(made)


def test_evaluations_are_kept_beside_each_other(here: Path) -> None:
    """Of a config, a run of the same name, and other samples of that run."""

    def measured(*arguments: object) -> dict[str, Any]:
        with patch.object(session, "Pool", SessionPool):
            code, output = command("eval", *arguments, "--problems", 2)
        assert code == 0, output
        (line,) = (line for line in output.splitlines() if line.startswith("completions: "))
        samples = Path(line.removeprefix("completions: "))
        found.append(str(samples.parent))
        return json.loads((samples.parent / "summary.json").read_text())  # type: ignore[no-any-return]

    found: list[str] = []
    train_here(load_config("base.yaml"), here / "runs/base")
    first = measured("base.yaml")
    bytes_before = (here / "evaluations/base/summary.json").read_bytes()
    second, third = measured("runs/base"), measured("runs/base", "--samples", 3, "--temperature", 0.5)
    assert found == ["evaluations/base", "evaluations/base-2", "evaluations/base-3"]
    assert (here / "evaluations/base/summary.json").read_bytes() == bytes_before
    told = [(each["target"], each["temperature"], each["samples"]) for each in (first, second, third)]
    assert told == [("base.yaml", 0.0, 1), ("runs/base", 0.0, 1), ("runs/base", 0.5, 3)]


def test_a_file_that_cannot_have_its_name_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_text(tmp_path / "folder", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(
    ("number", "end"),
    [
        (errno.EEXIST, ""),
        (errno.EACCES, ""),
        (errno.ENOSPC, "; make room or give another place, then resume"),
    ],
)
def test_what_only_fails_when_it_is_written_is_a_sentence_too(here: Path, number: int, end: str) -> None:
    error = OSError(number, os.strerror(number), "out.jsonl")
    with patch.object(run_folder, "_sync", side_effect=error):
        assert refusal("score", *COMMANDS["score"], "out.jsonl") == f"out.jsonl: {os.strerror(number)}{end}"
