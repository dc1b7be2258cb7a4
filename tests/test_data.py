"""What a run or a comparison is made of, and has changed since it began, is noticed before anything is added to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from inputs import random_center
from run_folders import comparison_of
from small_runs import SessionPool, resume_here, small_config, train_here, write_rows

from es_engine import session
from es_engine.compare.plan import INPUTS_FILE, keep_inputs, known_inputs
from es_engine.compare.runner import compare
from es_engine.config import ComparisonConfig, parse_config
from es_engine.data import data_fingerprints
from es_engine.ledger import Ledger
from es_engine.past import replay
from es_engine.session import Session
from es_engine.spaces.lora import LoraSpace
from rewards.problems import fingerprint
from workers.models import linear_matrices

ES = {"kind": "es", "population": 4, "prompts": 2, "sigma": 0.1}
ONE = {"generations": 1}


def demonstrations(path: Path, word: str) -> str:
    return write_rows(path, [{"prompt": f"{number}+0=", "completion": f"{word}{number}"} for number in range(6)])


def problems(path: Path, first: int) -> str:
    rows = [{"numbers": [number, 2], "target": number + 2} for number in range(first, first + 60)]
    return write_rows(path, rows)


def stage(method: dict[str, Any]) -> dict[str, Any]:
    return {"method": method, "optimizer": {"kind": "sgd", "lr": 0.1}, "budget": ONE}


# Runs


@pytest.mark.parametrize("kept_in", ["the method", "the task", "the second stage"])
def test_a_run_whose_data_has_changed_is_not_continued(random_llama: Path, tmp_path: Path, kept_in: str) -> None:
    path = tmp_path / "rows.jsonl"
    write = problems if kept_in == "the task" else demonstrations
    old: Any = 1 if kept_in == "the task" else ""
    data = write(path, old)
    sft = {"kind": "sft", "data": data, "batch": 2}
    staged = small_config(random_llama, ES).model_dump(mode="json") | {"stages": [stage(ES), stage(sft)]}
    config = {
        "the method": lambda: small_config(random_llama, sft, budget=ONE),
        "the task": lambda: small_config(random_llama, ES, task={"data": data}, budget=ONE),
        "the second stage": lambda: parse_config(staged),
    }[kept_in]()
    run = train_here(config, tmp_path / "run")
    ledger = (run / "ledger.jsonl").read_bytes()
    write(path, 3 if kept_in == "the task" else "1")
    with pytest.raises(ValueError, match=r"^\S+rows\.jsonl has changed since this was begun"):
        resume_here(run)
    assert (run / "ledger.jsonl").read_bytes() == ledger
    assert replay(run, 1).is_dir()  # for what is past it does not matter
    write(path, old)
    resume_here(run)


def test_replay_needs_no_data_of_a_later_stage(random_llama: Path, tmp_path: Path) -> None:
    sft = {"kind": "sft", "data": demonstrations(tmp_path / "rows.jsonl", ""), "batch": 2}
    config = small_config(random_llama, ES).model_dump(mode="json") | {"stages": [stage(ES), stage(sft)]}
    run = train_here(parse_config(config), tmp_path / "run")
    (tmp_path / "rows.jsonl").unlink()
    assert replay(run, 1).is_dir()


def test_a_run_of_which_no_hash_is_known_goes_on(random_llama: Path, tmp_path: Path) -> None:
    config = small_config(random_llama, ES, task={"data": problems(tmp_path / "rows.jsonl", 1)}, budget=ONE)
    run = train_here(config, tmp_path / "run")
    first, *rest = (run / "ledger.jsonl").read_text().splitlines(keepends=True)
    header = json.loads(first)
    del header["data"]
    (run / "ledger.jsonl").write_text("".join([json.dumps(header) + "\n", *rest]))
    resume_here(run)


@pytest.mark.parametrize("data", [[], 5, "x", {"a": 5}, None])
def test_hashes_that_are_none_are_named(tmp_path: Path, data: Any) -> None:
    (tmp_path / "ledger.jsonl").write_text(json.dumps({"kind": "run", "config": {}, "data": data}) + "\n")
    with pytest.raises(ValueError, match=r"ledger\.jsonl.*data"):
        Ledger(tmp_path / "ledger.jsonl")


# Comparisons


@pytest.fixture
def compared(random_llama: Path, tmp_path: Path) -> ComparisonConfig:
    """One of a task, a method and another task with data, a start and a teacher; it can gain a seed."""
    space = LoraSpace(linear_matrices(random_llama, "all-linear"), rank=4, alpha=8.0, train="AB", seed=5)
    for number, name in enumerate(("start", "taught")):
        space.save(random_center(space, 0.1 * (1 + number)), tmp_path / name, str(random_llama))
    task = {"kind": "countdown", "template": "plain", "data": problems(tmp_path / "task.jsonl", 1), "max_tokens": 4}
    (tmp_path / "verifier.py").write_text("def digits(rollout):\n    return float(rollout.completion.isdigit())\n#\n")
    part = {"verifier": f"{tmp_path / 'verifier.py'}:digits", "weight": 1.0}
    other = {**task, "data": problems(tmp_path / "other.jsonl", 1), "reward": {"digits": part}}
    own = {"name", "seed", "budget", "method", "stages", "space"}
    run = small_config(random_llama, ES).model_dump(mode="json", exclude=own)
    sft = {"kind": "sft", "data": demonstrations(tmp_path / "method.jsonl", ""), "batch": 2}
    opd = {"kind": "opd", "teacher": {"adapter": str(tmp_path / "taught")}, "prompts": 2, "samples": 2}
    return comparison_of(
        run={**run, "space": {"rank": 4, "alpha": 8.0}, "task": task, "evaluation": {"problems": 4, "chunk": 4}},
        runs={
            "es": {"method": ES, "space": {"init": str(tmp_path / "start")}},
            "sft": {"method": sft},
            "opd": {"method": opd},
        },
        budget=ONE,
        seeds=[1],
        samples={"n": 1},
        other_tasks={"other": other},
    )


def changed(text: bytes) -> bytes:
    """The lines of a file that are left without the last."""
    return b"".join(text.splitlines(keepends=True)[:-1])


def compare_here(chosen: ComparisonConfig, folder: Path) -> None:
    with patch.object(session, "Pool", SessionPool):
        compare(chosen, folder)


def test_a_comparison_goes_on_with_what_it_was_begun_with_alone(compared: ComparisonConfig, tmp_path: Path) -> None:
    folder = tmp_path / "methods"
    compare_here(compared, folder)
    grown = compared.model_copy(update={"seeds": (1, 2)})
    for name in ("task.jsonl", "method.jsonl", "other.jsonl", "verifier.py", "start", "taught"):
        called = tmp_path / name
        path = called / "adapter_model.safetensors" if called.is_dir() else called
        old = path.read_bytes()
        path.write_bytes(old[:-4] + bytes(4) if called.is_dir() else changed(old))
        with pytest.raises(
            ValueError, match=rf"{called} has changed since this was begun, which can go on with the same"
        ):
            compare_here(grown, folder)
        assert not (folder / "runs/es/seed-2").exists()
        with patch.object(session, "Pool", side_effect=AssertionError("nothing is left to run")):
            compare(compared, folder)  # the tables of what is done
        path.write_bytes(old)
    compare_here(grown, folder)
    assert (folder / "runs/opd/seed-2/measures.json").is_file()


def test_data_that_changes_while_a_comparison_goes_on_ends_it(compared: ComparisonConfig, tmp_path: Path) -> None:
    """Before anything is trained with the new."""
    turn_to, path = Session.turn_to, tmp_path / "method.jsonl"

    def turn_and_change(self: Session, config: Any) -> None:
        turn_to(self, config)
        demonstrations(path, "1")

    with (
        patch.object(Session, "turn_to", turn_and_change),
        pytest.raises(ValueError, match=rf"^{path} has changed since this was begun"),
    ):
        compare_here(compared, tmp_path / "methods")
    assert (tmp_path / "methods/runs/es/seed-1/measures.json").exists()
    assert not (tmp_path / "methods/runs/sft").exists()


def test_hashes_of_a_comparison_of_which_no_run_has_begun_are_forgotten(tmp_path: Path) -> None:
    keep_inputs(tmp_path, {"rows.jsonl": "1"})
    assert known_inputs(tmp_path) == {}
    (tmp_path / "runs").mkdir()
    assert known_inputs(tmp_path) == {"rows.jsonl": "1"}


@pytest.mark.parametrize("text", ["[]", "5", "x", "", '{"a": 5}'])
def test_hashes_of_a_comparison_that_are_none_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / INPUTS_FILE).write_text(text)
    with pytest.raises(ValueError, match=r"inputs\.json: accepted is a JSON object of hashes by name; it was damaged"):
        known_inputs(tmp_path)


# Hashes


def test_problems_that_are_generated_have_no_data(random_llama: Path) -> None:
    assert data_fingerprints(small_config(random_llama, ES)) == {}


def test_a_folder_is_the_same_until_a_file_of_it_changes(tmp_path: Path) -> None:
    for name, text in (("a.json", "1"), ("b.json", "2"), ("notes.txt", "")):
        (tmp_path / name).write_text(text)
    first = fingerprint(str(tmp_path), "task.data")
    (tmp_path / "notes.txt").write_text("not read")
    assert fingerprint(str(tmp_path), "task.data") == first
    (tmp_path / "b.json").write_text("3")
    assert fingerprint(str(tmp_path), "task.data") != first
    (tmp_path / "b.json").write_text("2")
    (tmp_path / "a.json").rename(tmp_path / "c.json")
    assert fingerprint(str(tmp_path), "task.data") != first


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^method\.data: no file \S+absent\.jsonl$"):
        fingerprint(str(tmp_path / "absent.jsonl"), "method.data")


def test_a_hub_data_set_is_known_by_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    found = []
    for name, answer in (("one", 1), ("same", 1), ("other", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(json.dumps({"question": "1+1=", "answer": answer}) + "\n")
        found.append(fingerprint(f"hub:{tmp_path / name}", "task.data"))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("task", [{"verifier": "/absent.py:f"}, {"reward": {"part": {"verifier": "/absent.py:f"}}}])
def test_a_verifier_that_is_missing_is_told_by_whoever_loads_it(random_llama: Path, task: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^verifier: no file /absent\.py$"):
        Session(small_config(random_llama, ES, task=task), print)
