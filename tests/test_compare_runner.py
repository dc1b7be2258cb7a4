"""A whole comparison, and one that is stopped again and again: nothing is repeated, nothing lost."""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from command_line import command, refusal
from inputs import random_center
from small_runs import LocalPool, SessionPool, kill_command

from es_engine import session
from es_engine.compare import runner
from es_engine.compare.measures import read_measures
from es_engine.compare.runner import compare
from es_engine.config import ComparisonConfig, dump_comparison, parse_comparison
from es_engine.ledger import Ledger, first_difference
from es_engine.report import RunGroup, read_run
from es_engine.report.page import summary as page_summary
from es_engine.spaces.lora import LoraSpace
from es_engine.status import read_status
from workers.calls import Call
from workers.models import linear_matrices

DIGITS = """
def digits(rollout):
    text = rollout.completion
    return sum(character.isdigit() for character in text) / max(1, len(text))
"""
SPENT = {"seconds", "worker_seconds"}
"""What two runs of the same comparison may differ in."""


def comparison(model: Path, folder: Path, **changes: Any) -> ComparisonConfig:
    verifier = folder / "verifier.py"
    verifier.write_text(DIGITS)
    task = {"kind": "countdown", "template": "plain", "max_tokens": 8, "verifier": f"{verifier}:digits"}
    data: dict[str, Any] = {
        "name": "small",
        "run": {
            "model": {"source": str(model)},
            "space": {"rank": 4, "alpha": 8.0},
            "task": {**task, "numbers": [2], "high": 9},
            "pool": {"workers": 1},
            "engine": {"kind": "hf", "dtype": "float32", "device": "cpu", "chunk": 4},
            "evaluation": {"every": 1, "problems": 8, "chunk": 8},
            "telemetry": {"console": False, "tensorboard": False},
        },
        "budget": {"generations": 2},
        "seeds": [1, 2],
        "tuning": {"problems": 4},
        "runs": {
            "es": {
                "method": {"population": 4, "sigma": 0.1, "prompts": 4},
                "optimizer": {"kind": "sgd"},
                "grid": {"optimizer.lr": [0.5, 1.0]},
            },
            "sft": {
                "method": {"kind": "sft", "batch": 4},
                "optimizer": {"kind": "adam"},
                "grid": {"optimizer.lr": [0.001, 0.05]},
            },
        },
        "thresholds": [0.5],
        "samples": {"n": 2},
        "other_tasks": {
            "three": {**task, "numbers": [3]},
            "game": {"kind": "guess", "template": "plain", "high": 90, "span": 4},  # which SFT could not learn from
        },
    }
    return parse_comparison(data | changes)


def compare_here(chosen: ComparisonConfig, folder: Path) -> None:
    """Run a comparison without Ray."""
    with patch.object(session, "Pool", SessionPool):
        compare(chosen, folder)


def command_interrupted(number: signal.Signals, calls: int, *arguments: object) -> tuple[int, str]:
    """Run the command line without Ray, and send it a signal in place of its so-manieth call of a worker."""
    run_calls = LocalPool.run

    def run_or_stop(pool: LocalPool, given: Sequence[Call]) -> list[Any]:
        if len(pool.calls) + len(given) > calls:
            signal.raise_signal(number)
        return run_calls(pool, given)

    with patch.object(session, "Pool", SessionPool), patch.object(LocalPool, "run", run_or_stop):
        return command(*arguments)


@pytest.fixture(scope="module")
def chosen(random_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> ComparisonConfig:
    return comparison(random_llama, tmp_path_factory.mktemp("verifier"))


@pytest.fixture(scope="module")
def undisturbed(chosen: ComparisonConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison that nothing happened to."""
    folder = tmp_path_factory.mktemp("compare") / "undisturbed"
    compare_here(chosen, folder)
    return folder


def comparable(data: Any) -> Any:
    """Everything but seconds, and scores at equal seconds."""
    if isinstance(data, dict):
        return {key: comparable(value) for key, value in data.items() if key not in SPENT}
    return [comparable(value) for value in data] if isinstance(data, list) else data


def test_every_trial_and_final_run_is_there_and_measured(undisturbed: Path) -> None:
    folder = undisturbed
    assert {path.parent.name for path in folder.glob("tuning/*/trial-*")} == {"es", "sft"}
    assert len(list(folder.glob("tuning/*/trial-*/adapter"))) == 4
    finals = sorted(folder.glob("runs/*/seed-*"))
    assert len(finals) == 4
    for run in finals:
        measures = read_measures(run)
        assert measures.delta.absolute > 0
        assert measures.kl is not None
        assert measures.kl.per_token > 0
        assert measures.kl.completions == 8
        assert [len(each.after.rewards) for each in measures.other_tasks.values()] == [8, 8]
    before = {str(read_measures(run).other_tasks["three"].before) for run in finals}
    assert len(before) == 1
    summary = json.loads((folder / "comparison.json").read_text())
    assert list(summary["runs"]["sft"]["other_tasks"]) == ["three", "game"]
    assert summary["runs"]["es"]["figures"]["reward_final"]["mean"] == pytest.approx(
        np.mean([Ledger(folder / f"runs/es/seed-{seed}/eval.jsonl").lines[-1]["reward"] for seed in (1, 2)])
    )


def test_seeds_differ_and_methods_start_from_the_same_model(undisturbed: Path) -> None:
    evaluations = {path.parent: Ledger(path).lines for path in undisturbed.glob("runs/*/seed-*/eval.jsonl")}
    assert len({lines[0]["reward"] for lines in evaluations.values()}) == 1
    assert len({lines[-1]["theta"] for lines in evaluations.values()}) == len(evaluations)


def test_killed_and_interrupted_it_comes_to_the_same_tables(
    chosen: ComparisonConfig, undisturbed: Path, tmp_path: Path
) -> None:
    """Interrupted among the trials of the grids, killed (kill -9) among the final runs, then interrupted again."""
    config, folder = tmp_path / "comparison.yaml", tmp_path / "stopped"
    config.write_text(dump_comparison(chosen))
    arguments = ("compare", config, "--dir", folder)
    code, printed = command_interrupted(signal.SIGINT, 10, *arguments)
    assert (code, "a comparison goes on when it is begun again" in printed) == (130, True)
    assert not (folder / "runs").exists()
    kill_command(*arguments, calls=25)
    assert (folder / "runs/es/seed-1").exists()
    codes = [130]
    while codes[-1] == 130:
        codes.append(command_interrupted(signal.SIGTERM, 20, *arguments)[0])
    assert codes == [130, 130, 130, 0]

    for run in [path.relative_to(undisturbed).parent for path in undisturbed.rglob("ledger.jsonl")]:
        assert first_difference(folder / run / "ledger.jsonl", undisturbed / run / "ledger.jsonl") is None
        mine, theirs = (Ledger(each / run / "eval.jsonl").lines for each in (folder, undisturbed))
        assert [(line["step"], line["reward"]) for line in mine] == [(line["step"], line["reward"]) for line in theirs]
    mine, theirs = (json.loads((each / "comparison.json").read_text()) for each in (folder, undisturbed))
    assert comparable(mine) == comparable(theirs)


def test_runs_that_diverge_are_told_of_counted_as_they_are_and_not_repeated(
    chosen: ComparisonConfig, tmp_path: Path
) -> None:
    """Of the grid of one run a setting diverges, of that of the other all do."""
    sft = {"method": {"kind": "sft", "batch": 4}, "optimizer": {"kind": "adam"}}
    grids = {"careful": [1e30, 0.001], "wild": [1e30, 1e29]}
    runs = {run: {**sft, "grid": {"optimizer.lr": rates}} for run, rates in grids.items()}
    data = chosen.model_dump(mode="json") | {"runs": runs, "other_tasks": {}, "budget": {"generations": 3}}
    comparison, folder = parse_comparison(data), tmp_path / "diverging"
    compare_here(comparison, folder)

    summary = json.loads((folder / "comparison.json").read_text())
    marks = {run: [(trial["diverged"], trial["chosen"]) for trial in grid] for run, grid in summary["grids"].items()}
    assert marks == {"careful": [(True, False), (False, True)], "wild": [(True, True), (True, False)]}
    assert summary["grids"]["careful"][0]["reward"] is None
    assert {run: data["diverged"] for run, data in summary["runs"].items()} == {"careful": [], "wild": [1, 2]}
    for seed in (1, 2):
        run = folder / f"runs/wild/seed-{seed}"
        steps = len(Ledger(run / "ledger.jsonl").generations)
        assert [line["step"] for line in Ledger(run / "eval.jsonl").lines] == list(range(steps + 1))
        assert steps < 3
        assert read_measures(run).kl is None
        assert read_status(run).state == "diverged"
        assert page_summary([RunGroup("wild", (read_run(run),))]).rows[0][-1] == "diverged"
    reward = np.mean([Ledger(folder / f"runs/wild/seed-{seed}/eval.jsonl").lines[-1]["reward"] for seed in (1, 2)])
    assert summary["runs"]["wild"]["figures"]["reward_final"]["mean"] == pytest.approx(reward)
    processed = summary["equal_costs"]["processed"]
    assert processed["amount"] == min(summary["runs"]["careful"]["spent"]["processed"]["seeds"])  # wild ended before
    assert processed["runs"]["wild"]["reward"]["mean"] == pytest.approx(reward)
    assert summary["equal_costs"]["generated"] == {"amount": None, "runs": {}}
    written = (folder / "comparison.md").read_text()
    assert "Diverged, and counted as they were after their last step: wild (seed 1, 2)." in written
    assert "| 1 | 1e+30 | – | – | diverged, chosen |" in written
    assert (folder / "report.html").is_file()

    ledgers = {path: path.read_bytes() for path in folder.rglob("ledger.jsonl")}
    with patch.object(session, "Pool", side_effect=AssertionError("nothing is left to run")):
        compare(comparison, folder)
    run = folder / "runs/wild/seed-2"  # as if it had been killed when it had diverged and was not evaluated yet
    (run / "measures.json").unlink()
    shutil.rmtree(run / "adapter")
    compare_here(comparison, folder)
    assert comparable(json.loads((folder / "comparison.json").read_text())) == comparable(summary)
    assert {path: path.read_bytes() for path in ledgers} == ledgers


def test_what_is_finished_is_not_run_again(chosen: ComparisonConfig, undisturbed: Path) -> None:
    tables = (undisturbed / "comparison.md").read_bytes()
    with patch.object(session, "Pool", side_effect=AssertionError("nothing is left to run")):
        compare(chosen, undisturbed)
    assert (undisturbed / "comparison.md").read_bytes() == tables


def test_what_other_tasks_lose_is_counted_from_where_training_started(random_llama: Path, tmp_path: Path) -> None:
    """Steps are too small to change an answer here, so that what is after is what was before."""
    space = LoraSpace(linear_matrices(random_llama, "all-linear"), rank=4, alpha=8.0, train="AB", seed=5)
    space.save(random_center(space, 0.3), tmp_path / "start", str(random_llama))
    still = {"method": {"population": 4, "sigma": 0.1, "prompts": 4}, "optimizer": {"kind": "sgd", "lr": 1e-9}}
    runs = {"cold": still, "warm": still | {"space": {"init": str(tmp_path / "start")}}}
    chosen = comparison(random_llama, tmp_path, runs=runs, seeds=[1], budget={"generations": 1})
    compare_here(chosen, tmp_path / "c")
    found = {run: read_measures(tmp_path / "c/runs" / run / "seed-1").other_tasks["three"] for run in runs}
    for each in found.values():
        assert each.before == each.after
    assert found["cold"].before.rewards != found["warm"].before.rewards


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"max_tokens": 100_000}, "other_tasks.bad: the prompt of "),
        ({"data": "/absent.jsonl"}, "other_tasks.bad.data: no file /absent.jsonl"),
    ],
)
def test_another_task_that_cannot_be_measured_is_refused_before_training(
    chosen: ComparisonConfig, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    data = chosen.model_dump(mode="json")
    other = {"kind": "countdown", "template": "plain"}
    begun = parse_comparison(data | {"other_tasks": {"bad": other | changes}})
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        compare_here(begun, tmp_path / "c")
    assert not (tmp_path / "c/tuning").exists()
    with patch.object(runner, "_run"), suppress(ValueError):  # corrected, it may begin
        compare(parse_comparison(data | {"other_tasks": {"good": other}}), tmp_path / "c")


def test_two_processes_do_not_work_at_one_comparison(chosen: ComparisonConfig, tmp_path: Path) -> None:
    with (
        patch.object(session, "Pool", side_effect=lambda *_: compare(chosen, tmp_path / "c")),
        pytest.raises(
            ValueError, match=r"/c: process \d+ on \S+ since \S+ is at work in this folder; wait for its end"
        ),
    ):
        compare(chosen, tmp_path / "c")


def test_another_comparison_in_the_same_folder_is_refused(
    undisturbed: Path, random_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="it holds another comparison"):
        compare(comparison(random_llama, tmp_path), undisturbed)


def test_a_tracker_that_is_not_installed_ends_a_comparison_before_it_begins(
    chosen: ComparisonConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = {**chosen.run, "telemetry": {**chosen.run["telemetry"], "wandb": {}}}
    data = chosen.model_dump(mode="json") | {"run": run}
    with (
        patch.object(session, "Pool", side_effect=AssertionError("no run can begin")),
        pytest.raises(ValueError, match=r"^telemetry.wandb: wandb is not installed; use null, or install it with "),
    ):
        compare(parse_comparison(data), tmp_path / "c")
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [".lock", "comparison.yaml"]


def test_a_bad_comparison_is_one_sentence_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text("name: bad\nbudget: {generations: 1}\nruns: {es: {grid: {optimizer.lr: []}}}\n")
    assert refusal("compare", "bad.yaml").startswith("runs.es.grid.optimizer.lr: got []")
    assert not (tmp_path / "comparisons").exists()
