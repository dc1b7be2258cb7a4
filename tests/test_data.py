"""Data sets that have changed since a run or a comparison began are noticed before anything is added to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from run_folders import SHARED, comparison_of
from small_runs import resume_here, small_config, train_here, write_rows

from es_engine.compare.plan import DATA_FILE, open_folder
from es_engine.data import fingerprints
from es_engine.past import replay
from rewards.problems import fingerprint

ES = {"kind": "es", "population": 4, "prompts": 2}


def demonstrations(path: Path, word: str) -> str:
    return write_rows(path, [{"prompt": f"{number}+0=", "completion": f"{word}{number}"} for number in range(6)])


def problems(path: Path, first: int) -> str:
    rows = [{"numbers": [number, 2], "target": number + 2} for number in range(first, first + 60)]
    return write_rows(path, rows)


@pytest.mark.parametrize("kept_in", ["the method", "the task", "the second stage"])
def test_a_run_whose_data_has_changed_is_not_continued(random_llama: Path, tmp_path: Path, kept_in: str) -> None:
    path = tmp_path / "rows.jsonl"
    write = problems if kept_in == "the task" else demonstrations
    old: Any = 1 if kept_in == "the task" else ""
    data = write(path, old)
    budget, sft = {"generations": 1}, {"kind": "sft", "data": data, "batch": 2}
    config = {
        "the method": lambda: small_config(random_llama, sft, budget=budget),
        "the task": lambda: small_config(random_llama, ES, task={"data": data}, budget=budget),
        "the second stage": lambda: small_config(random_llama, ES).model_validate(
            small_config(random_llama, ES).model_dump(mode="json") | {"stages": [stage(ES, budget), stage(sft, budget)]}
        ),
    }[kept_in]()
    run = train_here(config, tmp_path / "run")
    ledger = (run / "ledger.jsonl").read_bytes()
    write(path, 3 if kept_in == "the task" else "1")
    with pytest.raises(ValueError, match=r"run: \S+rows\.jsonl is not what it was when the run began"):
        resume_here(run)
    assert (run / "ledger.jsonl").read_bytes() == ledger
    assert replay(run, 1).is_dir()  # what is past needs no data
    write(path, old)
    resume_here(run)


def stage(method: dict[str, Any], budget: dict[str, int]) -> dict[str, Any]:
    return {"method": method, "optimizer": {"kind": "sgd", "lr": 0.1}, "budget": budget}


@pytest.mark.parametrize("named_by", ["the task", "a run", "another task"])
def test_a_comparison_whose_data_has_changed_is_not_continued(tmp_path: Path, named_by: str) -> None:
    path, folder = tmp_path / "rows.jsonl", tmp_path / "methods"
    write = demonstrations if named_by == "a run" else problems
    old: Any = "" if named_by == "a run" else 1
    data = write(path, old)
    filed = {"kind": "countdown", "template": "plain", "data": data, "max_tokens": 8}
    comparison = comparison_of(
        **{
            "the task": {"run": {**SHARED, "task": filed}},
            "a run": {
                "runs": {"es": {}, "sft": {"method": {"kind": "sft", "data": data}}},
                "budget": {"generations": 5},
            },
            "another task": {"other_tasks": {"filed": filed}},
        }[named_by]
    )
    open_folder(comparison, folder)
    write(path, "1" if named_by == "a run" else 3)
    open_folder(comparison, folder)  # no run has begun
    (folder / "runs").mkdir()
    open_folder(comparison, folder)
    write(path, old)
    with pytest.raises(ValueError, match=r"methods: \S+rows\.jsonl is not what it was when the comparison began"):
        open_folder(comparison, folder)
    (folder / DATA_FILE).unlink()
    with pytest.raises(ValueError, match=r"methods: \S+rows\.jsonl is not what it was when the comparison began"):
        open_folder(comparison, folder)


def test_problems_that_are_generated_have_no_data(random_llama: Path) -> None:
    assert fingerprints([small_config(random_llama, ES)]) == {}


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
