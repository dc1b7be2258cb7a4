"""The run folder: what a crash leaves, and which checkpoint is taken."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from es_engine import run_folder
from es_engine.config import parse_config
from es_engine.run_folder import RunFolder, write_folder, write_json_lines, write_text

CONFIG = {
    "name": "small",
    "model": {"kind": "tiny"},
    "optimizer": {"kind": "sgd", "lr": 0.5},
    "task": {"kind": "countdown"},
    "budget": {"generations": 3},
}


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def writer(**files: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for name, text in files.items():
            (folder / name).write_text(text)

    return write


def killed(work: Callable[[], object]) -> None:
    """Run in a forked child that ends by SIGKILL, as `work` must bring about."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "adapter"
    write_folder(target, writer(a="1", b="2"))
    assert content(target) == {"a": "1", "b": "2"}
    write_folder(target, writer(a="3"))
    assert content(target) == {"a": "3"}
    assert [path.name for path in target.parent.iterdir()] == ["adapter"]


def test_a_crash_while_writing_keeps_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    write_folder(target, writer(a="1"))

    def half(folder: Path) -> None:
        (folder / "a").write_text("2")
        die()

    killed(lambda: write_folder(target, half))
    assert content(target) == {"a": "1"}
    write_folder(target, writer(b="3"))
    assert content(target) == {"b": "3"}
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("fatal", ["adapter", "adapter.partial"])
def test_a_crash_at_a_rename_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fatal: str) -> None:
    """Between the two renames there is no folder of the name: the old one waits beside it, and the next call has it."""
    target = tmp_path / "adapter"
    write_folder(target, writer(a="1"))
    rename = Path.rename

    def fatal_rename(path: Path, to: Path) -> Path:
        if path.name == fatal:
            die()
        return rename(path, to)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", fatal_rename)
        killed(lambda: write_folder(target, writer(a="2")))
    survivor = target if fatal == "adapter" else tmp_path / "adapter.old"
    assert content(survivor) == {"a": "1"}

    def refused(_folder: Path) -> None:
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        write_folder(target, refused)
    assert content(target) == {"a": "1"}
    write_folder(target, writer(a="3"))
    assert content(target) == {"a": "3"}
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_run_that_was_killed_while_its_config_was_written_can_be_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", die)
        killed(lambda: folder.create(parse_config(CONFIG)))
    assert [path.name for path in folder.path.iterdir()] == ["config.yaml.partial"]
    folder.create(parse_config(CONFIG))
    assert [path.name for path in folder.path.iterdir()] == ["config.yaml"]
    with pytest.raises(ValueError, match="this run folder exists already"):
        folder.create(parse_config(CONFIG))


def test_a_failed_write_keeps_the_old_folder_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    write_folder(target, writer(a="1"))

    def fail(folder: Path) -> None:
        (folder / "a").write_text("2")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        write_folder(target, fail)
    assert content(target) == {"a": "1"}
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_everything_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rename that reaches the disk before the data would leave an empty file under the right name."""
    events: list[str] = []
    sync, rename = run_folder._sync, Path.rename

    def noted_sync(path: Path) -> None:
        events.append(f"sync {path.name}")
        sync(path)

    def noted_rename(path: Path, to: Path) -> Path:
        events.append(f"name {to.name}")
        return rename(path, to)

    monkeypatch.setattr(run_folder, "_sync", noted_sync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    write_folder(tmp_path / "adapter", writer(a="1"))
    write_text(tmp_path / "text", "x")
    assert events == [
        *("sync a", "sync adapter.partial", "name adapter", f"sync {tmp_path.name}"),
        *("sync text.partial", "name text", f"sync {tmp_path.name}"),
    ]


def test_text_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "samples.jsonl"
    rows = [{"completion": "a\nb"}, {"completion": "é"}]
    write_json_lines(path, rows)
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    with monkeypatch.context() as patched:
        patched.setattr(run_folder, "_sync", die)
        killed(lambda: write_text(path, "new"))
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows

    def refuse(_path: Path) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(run_folder, "_sync", refuse)
        with pytest.raises(OSError, match="the disk is full"):
            write_text(path, "new")
    assert [other.name for other in path.parent.iterdir()] == ["samples.jsonl"]
    write_text(path, "new")
    assert path.read_text() == "new"


def tensors(step: int) -> dict[str, torch.Tensor]:
    """A theta and an optimizer's state, among them a number and a view that is not contiguous."""
    return {
        "theta": torch.full((5,), float(step)),
        "optimizer.step": torch.tensor(float(step)),
        "optimizer.exp_avg": torch.arange(6.0).reshape(2, 3).T,
    }


def checkpointed(path: Path, *steps: int) -> RunFolder:
    folder = RunFolder(path)
    for step in steps:
        folder.save_checkpoint(step, tensors(step))
    return folder


def found_step(folder: RunFolder, most: int = 10**6) -> int | None:
    found = next(folder.load_checkpoints(most), None)
    if found is None:
        return None
    step, loaded = found
    assert loaded.keys() == tensors(step).keys()
    assert all(torch.equal(loaded[name], tensors(step)[name]) for name in loaded)
    return step


def test_the_latest_two_checkpoints_are_kept(tmp_path: Path) -> None:
    folder = checkpointed(tmp_path, 1, 9, 10, 999_999, 1_000_000)
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["step-1000000", "step-999999"]
    assert found_step(folder) == 1_000_000
    assert found_step(folder, most=999_999) == 999_999
    assert found_step(folder, most=999_998) is None


def test_what_is_loaded_does_not_hold_the_file_open(tmp_path: Path) -> None:
    """On NFS neither the file nor its folder could be removed then, when the checkpoint is old."""
    found = next(checkpointed(tmp_path, 5).load_checkpoints(5), None)
    assert found is not None
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert torch.equal(found[1]["theta"], tensors(5)["theta"])


def test_an_old_checkpoint_that_cannot_be_removed_is_removed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpointed(tmp_path, 1, 2)
    remove = os.rmdir

    def busy(path: str, **where: int) -> None:
        if os.path.basename(path) == "step-000001":
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)
        remove(path, **where)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rmdir", busy)
        checkpointed(tmp_path, 3)
    assert folder.checkpoint_steps == [1, 2, 3]
    assert found_step(folder, most=1) is None
    checkpointed(tmp_path, 4)
    assert folder.checkpoint_steps == [3, 4]


def test_a_checkpoint_can_be_written_again(tmp_path: Path) -> None:
    assert found_step(checkpointed(tmp_path, 5, 5)) == 5


def test_without_checkpoints_there_is_none(tmp_path: Path) -> None:
    assert found_step(RunFolder(tmp_path)) is None


@pytest.mark.parametrize("damage", ["empty", "cut", "header", "missing", "folder"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path, damage: str) -> None:
    folder = checkpointed(tmp_path, 10, 20)
    file = folder.checkpoints / "step-000020" / "state.safetensors"
    whole = file.read_bytes()
    file.unlink()
    if damage == "folder":
        file.mkdir()
    elif damage != "missing":
        file.write_bytes({"empty": b"", "cut": whole[:-1], "header": b"\xff" * 8 + whole[8:]}[damage])
    assert found_step(folder) == 10
    checkpointed(tmp_path, 20)
    assert found_step(folder) == 20 or damage == "folder"


def test_what_a_crash_left_is_no_checkpoint(tmp_path: Path) -> None:
    folder = checkpointed(tmp_path, 10, 20)
    for leftover in ("step-000020.old", "step-000030.partial", "step-000040.old"):
        (folder.checkpoints / leftover).mkdir()
    assert found_step(folder) == 20
    checkpointed(tmp_path, 30)
    assert found_step(folder, most=20) == 20


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    """And says so as the system does, which is what the command line understands."""
    folder = checkpointed(tmp_path / "run", 10)
    answer = tmp_path / "answer"

    def save_too_much() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        try:
            folder.save_checkpoint(20, {"theta": torch.zeros(10_000)})
        except OSError as error:
            answer.write_text(str(error.errno))
        die()

    killed(save_too_much)
    assert answer.read_text() == str(errno.EFBIG)
    assert found_step(folder) == 10
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step-000010"]


def test_a_new_folder_holds_the_config(tmp_path: Path) -> None:
    config = parse_config(CONFIG)
    for path in (tmp_path / "runs" / "new", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        folder = RunFolder(path)
        folder.create(config)
        assert folder.load_config() == config
        assert folder.open_ledger().lines == folder.open_evaluations().lines == []


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "file"):
        for refuse in (RunFolder(path).refuse_existing, lambda path=path: RunFolder(path).create(parse_config(CONFIG))):
            with pytest.raises(ValueError, match=r"exists already; resume it, or give another with --run-dir$"):
                refuse()
    assert content(tmp_path) == {"file": "x"}


def test_a_run_that_ended_before_it_had_its_config_can_begin_again(tmp_path: Path) -> None:
    (tmp_path / "config.yaml.partial").write_text("nam")
    folder = RunFolder(tmp_path)
    folder.create(parse_config(CONFIG))
    assert folder.load_config() == parse_config(CONFIG)
    assert list(content(tmp_path)) == ["config.yaml"]


def test_a_folder_without_a_config_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not a run folder \(it has no config\.yaml\)"):
        RunFolder(tmp_path).load_config()
