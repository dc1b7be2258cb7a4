"""A comparison's plan: what comes when, what is done, which setting wins, and that the splits stay apart."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from run_folders import SHARED, comparison_of, finish
from small_runs import small_config, train_here

from es_engine.compare.plan import (
    BEFORE_FILE,
    MEASURES_FILE,
    Trial,
    check_splits,
    choose,
    final_trials,
    open_folder,
    pending,
    tuning_results,
    tuning_trials,
)
from es_engine.compare.progress import Progress
from es_engine.config import load_comparison
from es_engine.run_folder import RunFolder

LOCK = """
from rewards.environments import Turn

class Lock:
    max_turns = 2

    def reset(self, example):
        return example.info["code"]

    def step(self, state, completion):
        return Turn(state, "No.", {"solved": 0.0}, done=False, solved=False)
"""
SHIPPED = sorted((Path(__file__).parents[1] / "configs/comparisons").glob("*.yaml"))


def reach(trial: Trial, folder: Path, accuracy: float = 0.5, reward: float | None = None) -> None:
    """Make up a trial with these scores on all problems."""
    shape = (2, trial.config.evaluation.problems)
    finish(trial, folder, np.full(shape, accuracy), None if reward is None else np.full(shape, reward))


def test_grids_come_first_and_then_the_winners_on_all_seeds(tmp_path: Path) -> None:
    comparison = comparison_of()
    trials = pending(comparison, tmp_path)
    assert [str(trial.folder) for trial in trials] == [
        "tuning/es/trial-01",
        "tuning/es/trial-02",
        "tuning/grpo/trial-01",
        "tuning/grpo/trial-02",
    ]
    for trial, accuracy in zip(trials, (0.2, 0.6, 0.4, 0.3), strict=True):
        reach(trial, tmp_path, accuracy)
    finals = pending(comparison, tmp_path)
    assert [str(trial.folder) for trial in finals] == [
        f"runs/{run}/seed-{seed}" for seed in (1, 2, 3) for run in ("es", "grpo")
    ]
    assert {(trial.run, trial.number, trial.config.optimizer.lr) for trial in finals} == {
        ("es", 2, 6.0),
        ("grpo", 1, 1e-4),
    }
    for trial in finals:
        reach(trial, tmp_path)
    assert pending(comparison, tmp_path) == []


def test_what_is_done_is_not_done_again_and_what_was_begun_goes_on(tmp_path: Path) -> None:
    comparison = comparison_of(runs={"es": {}})
    first, second, third = pending(comparison, tmp_path)
    reach(first, tmp_path)
    reach(second, tmp_path)
    (tmp_path / second.folder / MEASURES_FILE).unlink()
    assert [trial.stage(tmp_path) for trial in (first, second, third)] == ["finished", "trained", "absent"]
    (tmp_path / second.folder / "adapter").rmdir()
    assert second.stage(tmp_path) == "begun"
    assert pending(comparison, tmp_path) == [second, third]


def test_a_trial_that_was_trained_is_finished_and_saw_validation_problems_alone(
    random_llama: Path, tmp_path: Path
) -> None:
    shared = small_config(random_llama, {"kind": "sft", "batch": 4}).model_dump(mode="json")
    run = {key: value for key, value in shared.items() if key not in ("name", "seed", "budget")}
    grid = {"grid": {"optimizer.lr": [1e-3, 1e-2]}}
    comparison = comparison_of(run=run, runs={"sft": grid}, budget={"generations": 1}, tuning={"problems": 4})
    trial = tuning_trials(comparison)[0]
    folder = RunFolder(train_here(trial.config, tmp_path / trial.folder))
    assert trial.stage(tmp_path) == "finished"
    problems = [trial.config.task.build().example("heldout", number).id for number in range(8, 12)]
    assert [line["step"] for line in folder.open_evaluations().lines] == [0, 1]
    for step in (0, 1):
        rows = map(json.loads, folder.samples_file(step).read_text().splitlines())
        assert [row["id"] for row in rows] == problems


def test_equal_rewards_are_told_apart_by_accuracy_and_a_trial_without_reward_never_wins(tmp_path: Path) -> None:
    runs = {"es": {"grid": {"optimizer.lr": [1.0, 2.0, 3.0, 4.0]}}}
    comparison = comparison_of(runs=runs)
    outcomes = ((0.9, np.nan), (0.1, 0.5), (0.2, 0.5), (0.2, 0.5))
    for trial, (accuracy, reward) in zip(tuning_trials(comparison), outcomes, strict=True):
        reach(trial, tmp_path, accuracy, reward)
    assert choose(comparison, tmp_path)["es"].number == 3


def test_a_setting_that_gives_few_answers_which_can_be_scored_does_not_win_by_them(tmp_path: Path) -> None:
    comparison = comparison_of(runs={"es": {"grid": {"optimizer.lr": [1.0, 2.0]}}})
    sound, collapsed = tuning_trials(comparison)
    before = np.linspace(0.0, 0.4, 8)
    finish(sound, tmp_path, np.ones((2, 8)), np.stack([before, np.full(8, 0.5)]))
    finish(collapsed, tmp_path, np.ones((2, 8)), np.stack([before, [1.0, *[np.nan] * 7]]))
    assert choose(comparison, tmp_path)["es"].number == 1
    assert tuning_results(comparison, tmp_path)["es"][1].reward == 1 / 8


def test_a_setting_does_not_win_by_a_floor_of_its_own(tmp_path: Path) -> None:
    comparison = comparison_of(runs={"es": {"grid": {"optimizer.lr": [1.0, 2.0]}}})
    sound, mute = tuning_trials(comparison)
    finish(sound, tmp_path, np.ones((2, 8)), np.stack([np.full(8, 0.1), np.full(8, 0.5)]))
    finish(mute, tmp_path, np.ones((2, 8)), np.stack([np.full(8, 1.0), [1.0, *[np.nan] * 7]]))
    assert choose(comparison, tmp_path)["es"].number == 1
    assert tuning_results(comparison, tmp_path)["es"][1].reward == pytest.approx((1 + 7 * 0.1) / 8)


def test_an_unfinished_trial_decides_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tuning/es/trial-01: this trial is not finished"):
        choose(comparison_of(), tmp_path)


def test_progress_counts_the_trials_and_guesses_the_time_that_is_left(tmp_path: Path) -> None:
    comparison = comparison_of()
    first, second, third, fourth = pending(comparison, tmp_path)
    reach(first, tmp_path)
    progress = Progress(comparison, tmp_path)
    assert progress.title(second) == "[2 of 10] tuning/es/trial-02: optimizer.lr 6.0"
    progress.done(second, 60.0)
    assert progress.title(third) == "[3 of 10] tuning/grpo/trial-01: optimizer.lr 0.0001 (about 0:08:00 left)"
    progress.done(third, 20.0)
    assert progress.title(fourth).endswith("(about 0:04:20 left)")
    for trial in (second, third, fourth):
        reach(trial, tmp_path)
    final, *_ = pending(comparison, tmp_path)
    assert Progress(comparison, tmp_path).title(final) == "[5 of 10] runs/es/seed-1: optimizer.lr 3.0"


def test_without_grids_there_is_nothing_to_tune(tmp_path: Path) -> None:
    comparison = comparison_of(runs={"es": {}})
    assert tuning_trials(comparison) == []
    assert len(final_trials(comparison, choose(comparison, tmp_path))) == 3
    check_splits(comparison)


def test_a_folder_belongs_to_one_comparison_which_may_gain_seeds(tmp_path: Path) -> None:
    folder = tmp_path / "methods"
    open_folder(comparison_of(), folder)
    open_folder(comparison_of(seeds=[1, 2, 3, 4], thresholds=[0.5]), folder)
    (folder / "runs").mkdir()
    with pytest.raises(
        ValueError, match=r"methods: it holds another comparison, whose budget.tokens is 4000 and not 5;"
    ):
        open_folder(comparison_of(budget={"tokens": 5}), folder)
    assert load_comparison(folder / "comparison.yaml").budget.tokens == 4000
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").write_text("")
    for taken in (tmp_path / "other", tmp_path / "other" / "notes"):
        with pytest.raises(ValueError, match=rf"{taken.name}: it exists and holds no comparison"):
            open_folder(comparison_of(), taken)


def test_a_comparison_of_which_no_run_could_begin_may_be_corrected(tmp_path: Path) -> None:
    open_folder(comparison_of(), tmp_path)
    corrected = comparison_of(budget={"tokens": 5})
    (tmp_path / BEFORE_FILE).write_text("{}")  # of other tasks that it may have no longer
    open_folder(corrected, tmp_path)
    assert not (tmp_path / BEFORE_FILE).exists()
    assert load_comparison(tmp_path / "comparison.yaml") == corrected


def test_a_comparison_that_was_killed_before_it_began_can_be_begun(tmp_path: Path) -> None:
    (tmp_path / "comparison.yaml.partial").write_text("name: me")
    open_folder(comparison_of(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["comparison.yaml"]


def test_a_task_with_too_few_problems_is_refused(tmp_path: Path) -> None:
    check_splits(comparison_of())
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"numbers": [{number}, 2], "target": {number + 2}}}\n' for number in range(1, 60)))
    task = {"kind": "countdown", "template": "plain", "data": str(rows)}
    with pytest.raises(ValueError, match=r"tuning.problems: got 8, but held-out problem \d+, a validation problem, is"):
        check_splits(comparison_of(run={**SHARED, "task": task}))
    rows.write_text("".join(f'{{"numbers": [{number}, 2], "target": {number + 2}}}\n' for number in range(1, 20)))
    with pytest.raises(ValueError, match=r"run.evaluation.problems: got 16, but 12 of these held-out problems are the"):
        check_splits(comparison_of(run={**SHARED, "task": task}, runs={"es": {}}))


def test_problems_that_are_numbered_or_open_alike_are_not_the_same(tmp_path: Path) -> None:
    (tmp_path / "lock.py").write_text(LOCK)
    rows = tmp_path / "locks.jsonl"
    task = {"kind": "environment", "environment": f"{tmp_path / 'lock.py'}:Lock", "data": str(rows), "max_tokens": 8}
    locks = comparison_of(run={**SHARED, "task": task}, runs={"es": {}, "fewer": {"method": {"population": 8}}})
    rows.write_text("".join(f'{{"id": {n // 2}, "prompt": "Open it.", "code": {n}}}\n' for n in range(400)))
    check_splits(locks)
    rows.write_text("".join(f'{{"id": {n}, "prompt": "Open it.", "code": {n % 20}}}\n' for n in range(400)))
    with pytest.raises(ValueError, match=r"problems: got 16, but \d+ of these held-out problems are the same"):
        check_splits(locks)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_splits_of_a_shipped_comparison_are_sound(path: Path) -> None:
    check_splits(load_comparison(path))
